//! A machine whose kernel has no IPv6 (`ipv6.disable=1`), for one program: sockets of that family
//! cannot be made (EAFNOSUPPORT), by a filter of system calls that bubblewrap sets.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::tool;

/// socket(2), by architecture.
const SOCKET: u32 = if cfg!(target_arch = "x86_64") { 41 } else { 198 };
const AF_INET6: u32 = 10;
const EAFNOSUPPORT: u32 = 97;
/// Operations of classic BPF (linux/bpf_common.h), and what a filter answers (linux/seccomp.h).
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;

/// `command` on such a machine; the filter is written into `dir`.
pub fn only(dir: &Path, command: &Command) -> Command {
    // Operation, how far to jump if so and if not, operand.
    let filter: [(u16, u8, u8, u32); 6] = [
        // seccomp_data: the number of the call, and its first argument.
        (LOAD, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 3, SOCKET),
        (LOAD, 0, 0, 16),
        (JUMP_IF_EQUAL, 0, 1, AF_INET6),
        (RETURN, 0, 0, ERRNO | EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ];
    let code = |(code, yes, no, operand): (u16, u8, u8, u32)| {
        [&code.to_ne_bytes()[..], &[yes, no], &operand.to_ne_bytes()].concat()
    };
    let file = dir.join("no-ipv6.bpf");
    fs::write(&file, filter.map(code).concat()).expect("the filter can be written");
    let mut limited = tool("sh");
    limited.args(["-c", "exec bwrap --die-with-parent --dev-bind / / --seccomp 9 \"$@\" 9<\"$0\""]).arg(file);
    limited.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited
}

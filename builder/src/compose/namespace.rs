//! Composing needs the ids of a whole system and mounts of its own, and no more. Root
//! has both; an ordinary user has them in a user namespace, with subordinate ids
//! (subuid(5), user_namespaces(7)).

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use oscontainer_program::exit::Usage;

/// Makes this process root: nothing to do where it is, also of a container or a
/// namespace; else this very command starts again as root of a new user namespace, and
/// what follows here is only reached on an error. `cache` is what it finds there, where
/// it would otherwise take root's own.
///
/// # Errors
/// [`Usage`] when the user has no subordinate ids.
pub fn become_root(cache: &Path) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--map-auto", "--mount", "--"]);
        command
    };
    let tried = unshare().arg("true").stdin(Stdio::null()).output().context("starting unshare (of util-linux)")?;
    if !tried.status.success() {
        let reason = String::from_utf8_lossy(&tried.stderr);
        return Err(Usage(format!(
            "composing needs root, or subordinate ids for this user in /etc/subuid and /etc/subgid, and newuidmap: {}",
            reason.trim()
        ))
        .into());
    }
    tracing::info!("composing as root of a user namespace");
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = unshare();
    command.arg(program).args(std::env::args_os().skip(1)).env("OSCONTAINER_CACHE_DIR", cache);
    Err(command.exec()).context("starting unshare")
}

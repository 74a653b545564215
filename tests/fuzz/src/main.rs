//! One input is up to four files, divided by lines of `%%`: a treefile and what it may
//! include. Whatever they hold, the flattener gives a treefile or one line of error.

#![no_main]

// The builder is a program without a library; its module is compiled here as it is.
#[path = "../../../builder/src/treefile/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the program uses what this does not")]
mod treefile;

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use treefile::Machine;

/// The files' names; they can include each other.
const NAMES: [&str; 4] = ["host.yaml", "b.yaml", "c.json", "d.ks"];

static DIRECTORY: LazyLock<TempDir> =
    LazyLock::new(|| tempfile::tempdir_in("/dev/shm").expect("a directory in memory"));

fuzz_target!(|input: &[u8]| {
    let text = String::from_utf8_lossy(input);
    let mut parts = text.splitn(NAMES.len(), "\n%%\n");
    for name in NAMES {
        let path = DIRECTORY.path().join(name);
        match parts.next() {
            Some(part) => fs::write(path, part).expect("a file in memory"),
            None => drop(fs::remove_file(path)),
        }
    }
    let machine = Machine { basearch: "x86_64".to_owned(), releasever: None };
    match treefile::load(&DIRECTORY.path().join(NAMES[0]), &machine) {
        Ok(flattened) => {
            assert!(flattened.to_json().is_object());
            for field in flattened.treefile.refused_by_dnf() {
                assert!(!flattened.origins.of(field.name).is_empty(), "{} comes from nowhere", field.name);
            }
        }
        Err(error) => {
            let message = format!("{error:#}");
            assert!(!message.contains('\n'), "an error of several lines: {message}");
        }
    }
});

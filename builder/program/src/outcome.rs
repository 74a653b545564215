//! How a command ended, for machines: one line of JSON in a file, such as a Pod's
//! termination message.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::exit;

/// The largest line, in bytes: a Pod's termination message is cut at 4 KiB, and all
/// containers of a Pod share 12.
const MAX: usize = 2 << 10;

/// How a command failed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Failure {
    error: String,
    exit_code: u8,
}

/// Writes the result of a command into `file`: its own keys, or `error` and `exitCode`.
///
/// # Errors
/// When the file cannot be written.
pub fn write(file: &Path, result: &Result<impl Serialize>) -> Result<()> {
    let line = match result {
        Ok(success) => serde_json::to_string(success)?,
        Err(error) => failure(error)?,
    };
    fs::write(file, format!("{line}\n")).with_context(|| format!("writing --result-file {}", file.display()))
}

/// The failure as JSON, its text cut so that the line fits.
fn failure(error: &anyhow::Error) -> Result<String> {
    let mut failure = Failure { error: exit::chain(error), exit_code: exit::code(error) };
    loop {
        let line = serde_json::to_string(&failure)?;
        if line.len() < MAX {
            return Ok(line);
        }
        let excess = line.len() - MAX + 1;
        let keep = failure.error.len().saturating_sub(excess + '…'.len_utf8());
        failure.error.truncate(failure.error.floor_char_boundary(keep));
        failure.error.push('…');
    }
}

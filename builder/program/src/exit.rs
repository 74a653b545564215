//! Exit codes, and errors printed once as one chain. What went wrong decides the
//! code: a marker in the error's chain says that retrying is pointless, or that
//! the command line is wrong; everything else is worth a retry.

use oscontainer_artifact::Rejected;

/// Wrong usage that clap cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Done.
pub const DONE: u8 = 0;
/// Failed, and worth retrying: network, space.
pub const RETRY: u8 = 1;
/// Wrong usage.
pub const USAGE: u8 = 2;
/// Input rejected: retrying is pointless.
pub const REJECTED: u8 = 3;

/// Ends the function with a [`Rejected`] error, formatted as by `format!`.
#[macro_export]
macro_rules! reject {
    ($($arg:tt)*) => {
        return Err(::oscontainer_artifact::Rejected::new(format!($($arg)*)).into())
    };
}

/// The exit code for `error`, from the markers in its chain.
pub fn code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|e| e.is::<Usage>()) {
        USAGE
    } else if error.chain().any(|e| e.is::<Rejected>()) {
        REJECTED
    } else {
        RETRY
    }
}

/// The chain in one line: each cause once, although many libraries' messages
/// repeat their source's.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

//! What both programs do alike at their edges: global options, the log, progress,
//! exit codes, the HTTP client, and files as HTTP responses. It knows nothing of
//! composing or assembling.

pub mod client;
pub mod exit;
pub mod files;
pub mod options;
pub mod progress;
pub mod server;
pub mod staging;

//! What both programs do alike at their edges: global options, the log, progress,
//! exit codes, the HTTP client, files as HTTP responses, and pages for people. It knows
//! nothing of composing or assembling.

mod activity;
pub mod buffer;
pub mod client;
pub mod exit;
pub mod files;
pub mod moment;
pub mod options;
pub mod outcome;
pub mod page;
pub mod progress;
pub mod retry;
pub mod server;
pub mod staging;
pub mod stop;
pub mod tls;

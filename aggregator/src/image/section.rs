//! A part of a file as a reader of its own: several read one file at a time.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Reads the bytes of `file` from `position` up to `end`.
pub struct Section<'a> {
    file: &'a File,
    position: u64,
    end: u64,
}

impl<'a> Section<'a> {
    /// The `size` bytes of `file` from `start` on.
    pub fn new(file: &'a File, start: u64, size: u64) -> Self {
        Self { file, position: start, end: start.saturating_add(size) }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.end - self.position).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..length], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

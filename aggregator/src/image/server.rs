//! The server binary that goes into the image. The image has nothing else in it,
//! so a program that needs a loader or a library would never start: its ELF header
//! says so, and it also says the architecture, which is thereby the image's.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Digest, Hasher};
use oscontainer_program::exit::Usage;

use super::section::Section;

/// The running program, whatever its path is by now.
const SELF: &str = "/proc/self/exe";
/// A program header of the type that asks for a loader (ELF specification, "PT_INTERP").
const PT_INTERP: u32 = 3;
/// The most program headers that are read; real programs have about a dozen.
const MAX_HEADERS: u16 = 256;

/// A static executable, open.
pub struct Opened {
    file: File,
    shown: String,
    /// OCI's name of the machine that runs it.
    pub architecture: &'static str,
}

/// A static executable that was read.
pub struct Server {
    file: File,
    /// Bytes.
    pub size: u64,
    /// Of its content.
    pub digest: Digest,
    /// OCI's name of the machine that runs it.
    pub architecture: &'static str,
}

impl Opened {
    /// Opens `path`, or the running program.
    ///
    /// # Errors
    /// [`Usage`] when it is not a static executable of a known machine; else when it
    /// cannot be read.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let path = path.unwrap_or(Path::new(SELF));
        let shown = if path == Path::new(SELF) { "the running program".into() } else { path.display().to_string() };
        let file = File::open(path).with_context(|| format!("opening the server binary {shown}"))?;
        let metadata = file.metadata().with_context(|| format!("reading the server binary {shown}"))?;
        let found = if metadata.is_file() {
            inspect(|offset, bytes| file.read_exact_at(bytes, offset).ok())
        } else {
            Err("is not a file")
        };
        let architecture = found.map_err(|reason| {
            Usage(format!(
                "{shown} {reason}, so it cannot be the server of an image that holds nothing else: \
                 `make static` leaves a static one at target/static/oscontainer-aggregator; give it by --server"
            ))
        })?;
        tracing::info!("the server is {shown}, for {architecture}");
        Ok(Self { file, shown, architecture })
    }

    /// Reads it, which takes as long as much of an update does.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(self) -> Result<Server> {
        let Self { file, shown, architecture } = self;
        let mut hasher = Hasher::new();
        let read = file.metadata().and_then(|metadata| {
            hasher.update_from(Section::new(&file, 0, metadata.len()))?;
            Ok(metadata.len())
        });
        let size = read.with_context(|| format!("reading the server binary {shown}"))?;
        Ok(Server { file, size, digest: hasher.digest(), architecture })
    }
}

impl Server {
    /// Its bytes, from the start.
    pub fn content(&self) -> Box<dyn Read + '_> {
        Box::new(Section::new(&self.file, 0, self.size))
    }
}

/// The OCI architecture of the static executable that `read` reads (offset, buffer);
/// or what is wrong with it. Offsets are those of the ELF specification, "ELF
/// header" and "Program header".
fn inspect(read: impl Fn(u64, &mut [u8]) -> Option<()>) -> Result<&'static str, &'static str> {
    const SHORT: &str = "is no ELF executable";
    let mut header = [0; 64];
    read(0, &mut header[..52]).ok_or(SHORT)?;
    if header[..4] != *b"\x7fELF" {
        return Err(SHORT);
    }
    let wide = header[4] == 2;
    let little = header[5] == 1;
    if wide {
        read(0, &mut header).ok_or(SHORT)?;
    }
    let number = |bytes: &[u8]| {
        let fold = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        if little { bytes.iter().rev().fold(0, fold) } else { bytes.iter().fold(0, fold) }
    };
    // ET_EXEC, or ET_DYN: a position-independent executable.
    if ![2, 3].contains(&number(&header[16..18])) {
        return Err(SHORT);
    }
    let architecture = match (number(&header[18..20]), wide, little) {
        (62, true, true) => "amd64",
        (183, true, true) => "arm64",
        (21, true, true) => "ppc64le",
        (22, true, false) => "s390x",
        (243, true, true) => "riscv64",
        (258, true, true) => "loong64",
        (40, false, true) => "arm",
        (3, false, true) => "386",
        _ => return Err("is an executable for a machine that is not supported"),
    };
    let (start, size, count) = if wide {
        (number(&header[32..40]), number(&header[54..56]), number(&header[56..58]))
    } else {
        (number(&header[28..32]), number(&header[42..44]), number(&header[44..46]))
    };
    if size < 32 || count == 0 || count > u64::from(MAX_HEADERS) {
        return Err(SHORT);
    }
    for index in 0..count {
        let mut kind = [0; 4];
        let offset = start.checked_add(index * size).ok_or(SHORT)?;
        read(offset, &mut kind).ok_or(SHORT)?;
        if number(&kind) == u64::from(PT_INTERP) {
            return Err("is linked dynamically");
        }
    }
    Ok(architecture)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit little-endian ELF header with one program header of type `kind`.
    fn elf(machine: u8, kind: u8) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 3;
        bytes[18] = machine;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = kind;
        bytes
    }

    #[test]
    fn only_static_executables_pass() {
        let mut object = elf(62, 1);
        object[16] = 1;
        let mut cut = elf(62, 1);
        cut.truncate(60);
        let mut far = elf(62, 1);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        for (bytes, expected) in [
            (elf(62, 1), Ok("amd64")),
            (elf(183, 6), Ok("arm64")),
            (elf(62, 3), Err("is linked dynamically")),
            (elf(8, 1), Err("is an executable for a machine that is not supported")),
            (object, Err("is no ELF executable")),
            (cut, Err("is no ELF executable")),
            (far, Err("is no ELF executable")),
            (b"#!/bin/sh\n".to_vec(), Err("is no ELF executable")),
            (Vec::new(), Err("is no ELF executable")),
        ] {
            let read = |offset: u64, buffer: &mut [u8]| {
                let start = usize::try_from(offset).ok()?;
                buffer.copy_from_slice(bytes.get(start..start.checked_add(buffer.len())?)?);
                Some(())
            };
            assert_eq!(inspect(read), expected);
        }
    }
}

//! The canonical tarball: for each path, kind and size there is exactly one
//! header. `pack` writes it; the verifier writes it again and compares, so that
//! nothing can hide in a field that tar readers ignore. The format is POSIX.1-2001
//! pax, with an extended header only where ustar has no room.

use tar::{EntryType, Header};

/// Bytes in a tar block (POSIX.1-2001, pax, "ustar Interchange Format").
pub const BLOCK: usize = 512;
/// What ends the archive: two blocks of zeros, and nothing after them.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
/// `config` of the repository in the tarball.
pub const CONFIG: &[u8] = b"[core]\nrepo_version=1\nmode=archive-z2\nindexed-deltas=true\n";
/// The directories that libostree wants to see in a repository.
pub const DIRECTORIES: [&str; 9] =
    ["extensions", "objects", "refs", "refs/heads", "refs/mirrors", "refs/remotes", "state", "tmp", "tmp/cache"];
/// The largest size that ustar's 11 octal digits hold.
const MAX_USTAR_SIZE: u64 = 0o777_7777_7777;
/// The longest path that ustar's name field holds.
const MAX_USTAR_NAME: usize = 100;

/// What an entry is; nothing else is in a tarball.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory, mode 0755, its path without a slash at the end.
    Directory,
    /// A regular file of that many bytes, mode 0644.
    File(u64),
}

/// The one header (one block, or three with a pax extended header) of an entry.
/// `path` is ASCII, relative, without a slash at the end.
pub fn header(path: &str, kind: Kind) -> Vec<u8> {
    match kind {
        Kind::Directory => entry(EntryType::Directory, 0o755, 0, &format!("{path}/")),
        Kind::File(size) => entry(EntryType::Regular, 0o644, size, path),
    }
}

/// The one header of an executable of `size` bytes, mode 0755: no artifact's tarball
/// has one, but an image's layer does.
pub fn executable(path: &str, size: u64) -> Vec<u8> {
    entry(EntryType::Regular, 0o755, size, path)
}

/// Bytes of the header of a file of `size` bytes, which is not made for it.
pub fn header_size(path: &str, size: u64) -> usize {
    match records(path, size).len() {
        0 => BLOCK,
        length => 2 * BLOCK + length + padding(length as u64),
    }
}

/// What ustar has no room for.
fn records(name: &str, size: u64) -> Vec<u8> {
    let mut records = Vec::new();
    if name.len() > MAX_USTAR_NAME {
        records.extend(pax_record("path", name));
    }
    if size > MAX_USTAR_SIZE {
        records.extend(pax_record("size", &size.to_string()));
    }
    records
}

fn entry(entry_type: EntryType, mode: u32, size: u64, name: &str) -> Vec<u8> {
    let records = records(name, size);
    let mut out = Vec::with_capacity(3 * BLOCK);
    if !records.is_empty() {
        out.extend(block(EntryType::XHeader, 0o644, records.len() as u64, "././@PaxHeader"));
        out.extend_from_slice(&records);
        out.resize(out.len() + padding(records.len() as u64), 0);
    }
    let short = &name[..name.len().min(MAX_USTAR_NAME)];
    out.extend(block(entry_type, mode, if size > MAX_USTAR_SIZE { 0 } else { size }, short));
    out
}

/// How many zero bytes follow `size` bytes of content, to the next block.
pub fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

fn block(entry_type: EntryType, mode: u32, size: u64, name: &str) -> [u8; BLOCK] {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(entry_type);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    *header.as_bytes()
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts itself (POSIX.1-2001, pax).
fn pax_record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    format!("{length} {key}={value}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_and_sizes_need_pax_and_are_read_back() {
        let long = format!("refs/heads/{}", "x".repeat(200));
        for (path, kind, blocks) in
            [("config", Kind::File(3), 1), (long.as_str(), Kind::File(0), 3), ("big", Kind::File(1 << 34), 3)]
        {
            let bytes = header(path, kind);
            assert_eq!(bytes.len(), blocks * BLOCK);
            let Kind::File(size) = kind else { unreachable!() };
            assert_eq!(header_size(path, size), bytes.len());
            let mut archive = tar::Archive::new(&bytes[..]);
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.path().unwrap().to_str(), Some(path));
            assert_eq!(entry.size(), size);
        }
    }
}

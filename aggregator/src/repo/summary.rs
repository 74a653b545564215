//! The summary, `(a(s(taya{sv}))a{sv})`, with the keys and in the order in which
//! libostree writes it (`ostree_repo_regenerate_summary`); but its last-modified
//! is the newest commit's timestamp, so that the same repository has the same
//! summary.

use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::Commit;

/// A ref and what the summary says of it.
pub struct Entry {
    /// The ref.
    pub name: String,
    /// Its commit.
    pub checksum: Checksum,
    /// Bytes of the commit object.
    pub size: u64,
    /// The commit.
    pub commit: Commit,
}

/// The summary of `entries`, which are sorted by name.
pub fn to_bytes(entries: &[Entry]) -> Vec<u8> {
    let refs = entries.iter().map(|entry| {
        let mut metadata = Vec::new();
        if let Some(version) = &entry.commit.version {
            metadata.push(pair("ostree.commit.version", "s", string(version)));
        }
        metadata.push(pair("ostree.commit.timestamp", "t", u64_be(entry.commit.timestamp)));
        let checksum = Value { bytes: entry.checksum.bytes().to_vec(), alignment: 1, fixed: false };
        structure(vec![string(&entry.name), structure(vec![size(entry.size), checksum, array(metadata)])])
    });
    let newest = entries.iter().map(|entry| entry.commit.timestamp).max().unwrap_or(0);
    let metadata = vec![
        pair("ostree.summary.mode", "s", string("archive-z2")),
        pair("ostree.summary.last-modified", "t", u64_be(newest)),
        pair("ostree.summary.tombstone-commits", "b", boolean(false)),
        pair("ostree.summary.indexed-deltas", "b", boolean(true)),
    ];
    structure(vec![array(refs.collect()), array(metadata)]).bytes
}

/// A serialised value. The `gvariant` crate needs types that are known when it is
/// compiled; a dictionary of mixed variants has none.
struct Value {
    bytes: Vec<u8>,
    alignment: usize,
    fixed: bool,
}

fn string(text: &str) -> Value {
    Value { bytes: [text.as_bytes(), b"\0"].concat(), alignment: 1, fixed: false }
}

/// libostree keeps its numbers big-endian within GVariants.
fn u64_be(number: u64) -> Value {
    Value { bytes: number.to_be_bytes().to_vec(), alignment: 8, fixed: true }
}

/// But for the size of a ref's commit, which is in the order of the machine that
/// wrote the summary (ostree-repo.c, `summary_add_ref_entry`): here, always little.
fn size(number: u64) -> Value {
    Value { bytes: number.to_le_bytes().to_vec(), alignment: 8, fixed: true }
}

fn boolean(value: bool) -> Value {
    Value { bytes: vec![u8::from(value)], alignment: 1, fixed: true }
}

/// A dictionary entry `{sv}`.
fn pair(key: &str, variant_type: &str, value: Value) -> Value {
    let bytes = [&value.bytes, &b"\0"[..], variant_type.as_bytes()].concat();
    structure(vec![string(key), Value { bytes, alignment: 8, fixed: false }])
}

/// A structure with at least one member that is not of fixed size: the ends of
/// such members but the last follow in reverse order (GVariant specification 1.0, 2.5.4).
fn structure(members: Vec<Value>) -> Value {
    let alignment = members.iter().map(|member| member.alignment).max().unwrap_or(1);
    let last = members.len().saturating_sub(1);
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    for (index, member) in members.into_iter().enumerate() {
        append(&mut bytes, &member);
        if !member.fixed && index != last {
            ends.insert(0, bytes.len());
        }
    }
    framed(bytes, &ends, alignment)
}

/// An array of elements that are not of fixed size: the end of each follows.
fn array(elements: Vec<Value>) -> Value {
    let alignment = elements.iter().map(|element| element.alignment).max().unwrap_or(8);
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    for element in elements {
        append(&mut bytes, &element);
        ends.push(bytes.len());
    }
    framed(bytes, &ends, alignment)
}

fn append(bytes: &mut Vec<u8>, value: &Value) {
    bytes.resize(bytes.len().next_multiple_of(value.alignment), 0);
    bytes.extend_from_slice(&value.bytes);
}

/// Adds the framing offsets, in the smallest of 1, 2, 4 and 8 bytes that can hold
/// the size of all.
fn framed(mut bytes: Vec<u8>, ends: &[usize], alignment: usize) -> Value {
    let width =
        [1, 2, 4].into_iter().find(|width| ((bytes.len() + ends.len() * width) as u64) < 1 << (8 * width)).unwrap_or(8);
    for end in ends {
        bytes.extend_from_slice(&(*end as u64).to_le_bytes()[..width]);
    }
    Value { bytes, alignment, fixed: false }
}

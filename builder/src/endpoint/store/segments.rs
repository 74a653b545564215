//! Large files in an object store: segments, each an object that is written once and never
//! changed, and an index that says which of them make the file. So an upload can be resumed
//! in every kind of store, by any endpoint, and what was sent can be read again at once;
//! multipart uploads can do neither, and end at 10,000 parts.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use opendal::{Buffer, Operator};
use oscontainer_artifact::digest::Hasher;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Bytes that all writers together hold in memory, as long as each gets the least of [`SEGMENT`].
const WRITING: u64 = 64 << 20;
/// The least and the most bytes of a segment that is written while more comes in.
const SEGMENT: (u64, u64) = (256 << 10, 16 << 20);
/// How many segments of one upload are written at the same time.
const WRITERS: usize = 3;
/// Bytes that all readers together hold in memory, as long as each gets the least of [`PIECE`].
const READING: u64 = 32 << 20;
/// The least and the most bytes that are read at a time.
const PIECE: (u64, u64) = (32 << 10, 8 << 20);
/// How many pieces of one file are read at the same time, and how many in a crowd.
const READERS: (usize, usize) = (3, 1);
/// How many files are sent at the same time in a crowd.
const CROWD: u64 = 64;
/// Reads at the same time, of all files: each has a connection, and that has memory.
static READS: Semaphore = Semaphore::const_new(48);

/// Bytes that readers hold, or are about to.
static HELD: AtomicU64 = AtomicU64::new(0);

/// How many uploads come in.
static UPLOADS: AtomicU64 = AtomicU64::new(0);
/// How many files are being sent.
static DOWNLOADS: AtomicU64 = AtomicU64::new(0);

/// A transfer under way: the more there are, the less memory each gets.
struct Active(&'static AtomicU64);

impl Active {
    fn new(count: &'static AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }

    /// How many there are.
    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed).max(1)
    }

    /// Each one's share of `budget`, of which `at_once` and one more are in memory.
    fn share(&self, budget: u64, at_once: usize, (least, most): (u64, u64)) -> u64 {
        (budget / self.count() / (at_once as u64 + 1)).clamp(least, most)
    }
}

/// A piece that is in memory, or will be soon.
struct Held(u64);

impl Held {
    fn new(length: u64) -> Self {
        HELD.fetch_add(length, Ordering::Relaxed);
        Self(length)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One segment, by its place in the file. Its name is unique: nothing is overwritten, whoever
/// else writes to the same upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Segment {
    /// Its first byte's place in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    unique: u64,
}

impl Segment {
    fn new(offset: u64, length: u64) -> Self {
        Self { offset, length, unique: random() }
    }

    /// The place of the byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// A number that nobody else has.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

impl Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:020}-{}-{:016x}", self.offset, self.length, self.unique)
    }
}

impl From<Segment> for String {
    fn from(segment: Segment) -> Self {
        segment.to_string()
    }
}

impl TryFrom<String> for Segment {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|()| format!("{text:?} is no segment"))
    }
}

impl FromStr for Segment {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.splitn(3, '-');
        let mut number = |radix| parts.next().and_then(|part| u64::from_str_radix(part, radix).ok()).ok_or(());
        Ok(Self { offset: number(10)?, length: number(10)?, unique: number(16)? })
    }
}

/// Of all segments that were written to an upload those that follow each other from the
/// first byte and lead furthest.
pub fn chain(mut segments: Vec<Segment>) -> Vec<Segment> {
    segments.sort_by_key(|segment| (segment.offset, segment.length, segment.unique));
    // What leads to each byte that can be reached.
    let mut reached: HashMap<u64, Segment> = HashMap::new();
    for segment in segments.into_iter().filter(|segment| segment.length > 0) {
        if segment.offset == 0 || reached.contains_key(&segment.offset) {
            reached.entry(segment.end()).or_insert(segment);
        }
    }
    let mut end = reached.keys().copied().max().unwrap_or_default();
    let mut chain = Vec::new();
    while end > 0
        && let Some(segment) = reached.remove(&end)
    {
        end = segment.offset;
        chain.push(segment);
    }
    chain.reverse();
    chain
}

/// A file's bytes, in order.
#[derive(Clone)]
pub struct Segments {
    store: Operator,
    /// Each object's path and size.
    objects: Arc<[(String, u64)]>,
}

impl Segments {
    /// The bytes of `objects`, one after the other.
    pub fn new(store: Operator, objects: impl Iterator<Item = (String, u64)>) -> Self {
        Self { store, objects: objects.collect() }
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.objects.iter().map(|(_, size)| size).sum()
    }

    /// `length` bytes from `start` on. A piece is read with a request of its own, and the next ones
    /// meanwhile, each to its end, whether somebody waits for it or not: memory is bounded, and a slow reader
    /// holds no connection to the store.
    pub fn stream(self, start: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        let Self { store, objects } = self;
        let active = Active::new(&DOWNLOADS);
        let at_once = if active.count() < CROWD { READERS.0 } else { READERS.1 };
        let pieces = Pieces { objects, object: 0, skip: start, left: length, active, at_once };
        let reads = futures_util::stream::iter(pieces).map(move |Piece { path, start, length, held }| {
            let store = store.clone();
            // Where nobody wants it any more it ends with this.
            let mut read = JoinSet::new();
            read.spawn(async move { piece(&store, &path, start, length).await });
            async move {
                let read = read.join_next().await.expect("one was spawned");
                Ok::<_, io::Error>((read.map_err(io::Error::other).flatten()?, held))
            }
        });
        let chunks = |(buffer, held): (Buffer, Held)| {
            // Until the last of them is taken.
            let chunk = move |chunk| (Ok(chunk), &held).0;
            futures_util::stream::iter(Iterator::map(buffer, chunk))
        };
        reads.buffered(at_once).map_ok(chunks).try_flatten()
    }

    /// Hashes everything from `start` on.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn hash(self, start: u64, hasher: &mut Hasher) -> Result<()> {
        let length = self.size().saturating_sub(start);
        let mut chunks = std::pin::pin!(self.stream(start, length));
        while let Some(chunk) = chunks.next().await {
            hasher.update(&chunk.context("reading what was uploaded")?);
        }
        Ok(())
    }
}

async fn piece(store: &Operator, path: &str, start: u64, length: u64) -> io::Result<Buffer> {
    let _turn = READS.acquire().await.map_err(io::Error::other)?;
    let buffer = store.read_with(path).range(start..start + length).await.map_err(io::Error::from)?;
    if buffer.len() as u64 != length {
        let text = format!("{path} has {} bytes from {start} on instead of {length}", buffer.len());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    if length < PIECE.1 {
        // As it came it keeps the connection's buffers, which are larger.
        return Ok(Buffer::from(buffer.to_vec()));
    }
    Ok(buffer)
}

/// What to read with one request: a part of one object.
struct Piece {
    path: String,
    start: u64,
    length: u64,
    held: Held,
}

/// What to read next.
struct Pieces {
    objects: Arc<[(String, u64)]>,
    object: usize,
    /// Bytes before the next piece, from the object's start on.
    skip: u64,
    left: u64,
    active: Active,
    /// How many are read at the same time.
    at_once: usize,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (path, size) = self.objects.get(self.object).filter(|_| self.left > 0)?;
            let rest = size.saturating_sub(self.skip);
            if rest == 0 {
                self.skip -= size;
                self.object += 1;
                continue;
            }
            // Those who came when there were few, and stand still, may have much.
            let free = READING.saturating_sub(HELD.load(Ordering::Relaxed)) / (self.at_once as u64 + 1);
            let share = self.active.share(READING, self.at_once, PIECE).min(free.max(PIECE.0));
            let length = rest.min(self.left).min(share);
            let start = self.skip;
            self.skip += length;
            self.left -= length;
            return Some(Piece { path: path.clone(), start, length, held: Held::new(length) });
        }
    }
}

/// A file that comes in: as soon as a segment is full it is written, while the next one fills.
pub struct Writer {
    store: Operator,
    runtime: Handle,
    /// The path of the upload's segments, with a slash at the end.
    path: String,
    done: Vec<Segment>,
    waiting: Vec<Bytes>,
    size: u64,
    writes: JoinSet<opendal::Result<()>>,
    active: Active,
}

impl Writer {
    /// One that adds to the segments below `path`.
    pub fn new(store: Operator, runtime: Handle, path: String, done: Vec<Segment>) -> Self {
        let active = Active::new(&UPLOADS);
        Self { store, runtime, path, done, waiting: Vec::new(), size: 0, writes: JoinSet::new(), active }
    }

    /// Adds `chunks`.
    ///
    /// # Errors
    /// When the store fails.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        self.waiting.extend(chunks.iter().cloned());
        self.size += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        if self.size >= self.active.share(WRITING, WRITERS, SEGMENT) {
            self.flush()?;
        }
        Ok(())
    }

    /// Waits until everything is in the store.
    ///
    /// # Errors
    /// When the store fails.
    pub fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.wait(0)
    }

    /// The segments so far.
    pub fn segments(&self) -> &[Segment] {
        &self.done
    }

    fn flush(&mut self) -> Result<()> {
        if self.size == 0 {
            return Ok(());
        }
        self.wait(WRITERS - 1)?;
        let segment = Segment::new(self.done.last().map_or(0, Segment::end), std::mem::take(&mut self.size));
        let content = Buffer::from(std::mem::take(&mut self.waiting));
        let (store, path) = (self.store.clone(), format!("{}{segment}", self.path));
        self.writes.spawn_on(async move { store.write(&path, content).await.map(drop) }, &self.runtime);
        self.done.push(segment);
        Ok(())
    }

    /// Waits until no more than `most` writes are under way.
    fn wait(&mut self, most: usize) -> Result<()> {
        while self.writes.len() > most {
            let written = self.runtime.block_on(self.writes.join_next());
            written.context("waiting for a write")?.context("waiting for a write")??;
        }
        Ok(())
    }
}

/// What an object that stands for a file says: which segments make it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// The id of the upload that wrote them.
    pub upload: String,
    /// The segments in their order.
    pub segments: Vec<Segment>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// When it is none, or has gaps.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let index: Self = serde_json::from_slice(bytes)?;
        let mut end = 0;
        for segment in &index.segments {
            ensure!(segment.offset == end, "there is a gap at byte {end}");
            end = segment.end();
        }
        Ok(index)
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_that_leads_furthest_is_taken() {
        let segment = |offset, length| Segment { offset, length, unique: offset + length };
        let ends = |segments: &[Segment]| chain(segments.to_vec()).iter().map(Segment::end).collect::<Vec<_>>();
        assert_eq!(ends(&[]), [0; 0]);
        assert_eq!(ends(&[segment(5, 5)]), [0; 0], "the beginning is missing");
        assert_eq!(ends(&[segment(10, 5), segment(0, 10), segment(20, 5)]), [10, 15], "there is a gap");
        // Two endpoints added to one upload; what leads on counts, not what is longest.
        let both = [segment(0, 16), segment(16, 4), segment(20, 20), segment(16, 16)];
        assert_eq!(ends(&both), [16, 20, 40]);
        assert_eq!(ends(&[segment(0, 0), segment(0, 1)]), [1]);
        for text in ["", "1", "1-2", "1-2-x", "-1-2-3", "00000000000000000000-5"] {
            assert!(text.parse::<Segment>().is_err(), "{text}");
        }
        assert_eq!(segment(7, 9).to_string().parse(), Ok(segment(7, 9)));
        assert!(Index::parse(br#"{"upload":"x","segments":["5-5-0"]}"#).is_err());
    }
}

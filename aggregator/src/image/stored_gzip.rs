//! gzip made of stored deflate blocks: what registries, engines and mirrors take
//! and keep as it is, for content that is compressed already. It costs 5 bytes in
//! 64 KiB, and the bytes depend on nothing but the content. The content and the
//! gzip file are hashed on the way, each in its own thread, for an image's config
//! names the one and its manifest the other.

use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use oscontainer_artifact::digest::{Digest, Hasher};

/// Bytes in a stored block: all that its 16-bit length holds (RFC 1951, 3.2.4).
const BLOCK: usize = 65_535;
/// Bytes handed on at a time: whole blocks, about 1 MiB.
const CHUNK: usize = 16 * BLOCK;
/// Chunks that wait for each hash; with [`CHUNK`] it bounds the memory.
const QUEUE: usize = 4;
/// The header: deflate, no name, mtime 0, no flags, system unknown (RFC 1952, 2.3).
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
/// CRC-32 and length after the last block.
const TRAILER: u64 = 8;

/// The size of the gzip file of `content` bytes: every block is full but the last,
/// which holds the rest and may be empty.
pub fn size(content: u64) -> u64 {
    HEADER.len() as u64 + content + 5 * (content / BLOCK as u64 + 1) + TRAILER
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// The content's digest.
    pub content: Digest,
    /// The gzip file's digest.
    pub file: Digest,
    /// The gzip file's size in bytes.
    pub size: u64,
}

/// Writes what it is given into `out` as gzip.
pub struct StoredGzip<W> {
    out: W,
    chunk: Vec<u8>,
    crc: crc32fast::Hasher,
    length: u64,
    content: HashThread,
    file: HashThread,
}

impl<W: Write> StoredGzip<W> {
    /// Starts a gzip file in `out`.
    ///
    /// # Errors
    /// When `out` cannot be written or no thread can be started.
    pub fn new(mut out: W) -> io::Result<Self> {
        let mut file = HashThread::start()?;
        out.write_all(&HEADER)?;
        file.update(HEADER.to_vec())?;
        Ok(Self {
            out,
            chunk: Vec::with_capacity(CHUNK),
            crc: crc32fast::Hasher::new(),
            length: 0,
            content: HashThread::start()?,
            file,
        })
    }

    /// Ends the gzip file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> io::Result<Written> {
        self.write_chunk(true)?;
        let mut trailer = self.crc.finalize().to_le_bytes().to_vec();
        // RFC 1952 wants the length modulo 2^32.
        trailer.extend_from_slice(&(self.length as u32).to_le_bytes());
        self.out.write_all(&trailer)?;
        self.file.update(trailer)?;
        self.out.flush()?;
        Ok(Written { content: self.content.finish()?, file: self.file.finish()?, size: size(self.length) })
    }

    /// Writes the buffered content as blocks. Before the end it is a full chunk,
    /// whose blocks are all full, so that the last block is always the short one.
    fn write_chunk(&mut self, last: bool) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        let mut framed = Vec::with_capacity(chunk.len() + 5 * (chunk.len() / BLOCK + 1));
        let mut blocks = chunk.chunks_exact(BLOCK);
        for block in &mut blocks {
            frame(&mut framed, block, false);
        }
        if last {
            frame(&mut framed, blocks.remainder(), true);
        }
        self.crc.update(&chunk);
        self.length += chunk.len() as u64;
        self.out.write_all(&framed)?;
        self.content.update(chunk)?;
        self.file.update(framed)
    }
}

impl<W: Write> Write for StoredGzip<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.write_chunk(false)?;
        }
        Ok(taken)
    }

    /// Does nothing: a block is written when it is full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One stored block: the final bit and type 0, the length, its complement, the bytes.
fn frame(out: &mut Vec<u8>, block: &[u8], last: bool) {
    let length = block.len() as u16;
    out.push(u8::from(last));
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&(!length).to_le_bytes());
    out.extend_from_slice(block);
}

/// SHA-256 in a thread of its own.
struct HashThread {
    chunks: SyncSender<Vec<u8>>,
    thread: JoinHandle<Digest>,
}

impl HashThread {
    fn start() -> io::Result<Self> {
        let (chunks, received) = sync_channel::<Vec<u8>>(QUEUE);
        let thread = std::thread::Builder::new().name("sha256".into()).spawn(move || {
            let mut hasher = Hasher::new();
            for chunk in received {
                hasher.update(&chunk);
            }
            hasher.digest()
        })?;
        Ok(Self { chunks, thread })
    }

    fn update(&mut self, chunk: Vec<u8>) -> io::Result<()> {
        self.chunks.send(chunk).map_err(|_| io::Error::other("the hashing thread ended early"))
    }

    fn finish(self) -> io::Result<Digest> {
        drop(self.chunks);
        self.thread.join().map_err(|_| io::Error::other("the hashing thread ended early"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_inflater_reads_it_and_its_size_is_known_before() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + BLOCK] {
            let content: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            let mut file = Vec::new();
            let mut gzip = StoredGzip::new(&mut file).unwrap();
            gzip.write_all(&content).unwrap();
            let written = gzip.finish().unwrap();
            assert_eq!((written.size, size(length as u64)), (file.len() as u64, file.len() as u64), "{length}");
            assert_eq!(written.content, Digest::of(&content));
            assert_eq!(written.file, Digest::of(&file));
            let (deflate, trailer) = file[10..].split_at(file.len() - 18);
            assert!(miniz_oxide::inflate::decompress_to_vec(deflate).unwrap() == content, "{length}");
            assert_eq!(trailer[..4], crc32fast::hash(&content).to_le_bytes());
            assert_eq!(trailer[4..], (length as u32).to_le_bytes());
        }
    }
}

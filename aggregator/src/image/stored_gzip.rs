//! gzip made of stored deflate blocks: what registries, engines and mirrors take
//! and keep as it is, for content that is compressed already. It costs 5 bytes in
//! 64 KiB, and the bytes depend on nothing but the content. The content and the
//! gzip file are hashed on the way, each in its own thread, for an image's config
//! names the one and its manifest the other.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use oscontainer_artifact::digest::{Digest, Hasher};

/// Bytes in a stored block: all that its 16-bit length holds (RFC 1951, 3.2.4).
const BLOCK: usize = 65_535;
/// Bytes handed on at a time: whole blocks, about 256 KiB, which a core's cache holds.
const CHUNK: usize = 4 * BLOCK;
/// Chunks that wait for each hash; with [`CHUNK`] it bounds the memory.
const QUEUE: usize = 8;
/// The header: deflate, no name, mtime 0, no flags, system unknown (RFC 1952, 2.3).
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
/// CRC-32 and length after the last block.
const TRAILER: u64 = 8;

/// The size of the gzip file of `content` bytes: every block is full but the last,
/// which holds the rest and may be empty.
pub fn size(content: u64) -> u64 {
    HEADER.len() as u64 + content + 5 * (content / BLOCK as u64 + 1) + TRAILER
}

/// The block that holds byte `position` of the content: where it starts in the gzip
/// file, and where in the block's content the byte is.
pub fn locate(position: u64) -> (u64, u64) {
    let block = BLOCK as u64;
    (HEADER.len() as u64 + position / block * (block + 5), position % block)
}

/// Where in the gzip file the block ends that holds the byte before `position` of the content; in the file's last
/// block it is beyond the end.
pub fn end(position: u64) -> u64 {
    let block = BLOCK as u64;
    position.div_ceil(block).saturating_mul(block + 5).saturating_add(HEADER.len() as u64)
}

/// Bytes that tell a gzip file of this form from others.
pub const START: usize = HEADER.len() + 5;

/// Whether a gzip file that starts so may be of this form. Others may share the header,
/// but not that of the first block.
pub fn is_stored(start: &[u8; START]) -> bool {
    let [.., last, a, b, c, d] = *start;
    start[..HEADER.len()] == HEADER && last <= 1 && u16::from_le_bytes([a, b]) == !u16::from_le_bytes([c, d])
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    chunk: Chunk,
    buffers: Buffers,
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
        let file = HashThread::start()?;
        out.write_all(&HEADER)?;
        file.update(Piece::Few(HEADER.to_vec()))?;
        let mut buffers = Buffers::default();
        let chunk = buffers.take();
        Ok(Self { out, chunk, buffers, crc: crc32fast::Hasher::new(), length: 0, content: HashThread::start()?, file })
    }

    /// Reads `content` to its end, straight into the buffer; gives its length in bytes.
    ///
    /// # Errors
    /// When it cannot be read, or the gzip file not written.
    pub fn copy(&mut self, content: &mut dyn Read) -> io::Result<u64> {
        let mut copied = 0;
        loop {
            match self.chunk.fill(content)? {
                0 => return Ok(copied),
                count => copied += count as u64,
            }
            if self.chunk.is_full() {
                self.write_chunk(false)?;
            }
        }
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
        self.file.update(Piece::Few(trailer))?;
        self.out.flush()?;
        Ok(Written { content: self.content.finish()?, file: self.file.finish()?, size: size(self.length) })
    }

    /// Writes the buffered content as blocks. Before the end it is a full chunk,
    /// whose blocks are all full, so that the last block is always the short one.
    fn write_chunk(&mut self, last: bool) -> io::Result<()> {
        let next = self.buffers.take();
        let chunk = self.buffers.lend(std::mem::replace(&mut self.chunk, next));
        self.content.update(Piece::Plain(Arc::clone(&chunk)))?;
        self.file.update(Piece::Framed(Arc::clone(&chunk), last))?;
        self.crc.update(chunk.bytes());
        self.length += chunk.bytes().len() as u64;
        let frames: Vec<_> = frames(chunk.bytes(), last).collect();
        let mut parts: Vec<_> =
            frames.iter().flat_map(|(header, block)| [IoSlice::new(header), IoSlice::new(block)]).collect();
        let mut parts = &mut parts[..];
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            match self.out.write_vectored(parts) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => IoSlice::advance_slices(&mut parts, count),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl<W: Write> Write for StoredGzip<W> {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<usize> {
        let taken = self.chunk.fill(&mut bytes)?;
        if self.chunk.is_full() {
            self.write_chunk(false)?;
        }
        Ok(taken)
    }

    /// Does nothing: a block is written when it is full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The stored blocks of a chunk: of each the final bit and type 0, the length and its complement; and the
/// bytes. What is not a full block makes one only at the end.
fn frames(chunk: &[u8], last: bool) -> impl Iterator<Item = ([u8; 5], &[u8])> {
    let header = |block: &[u8], last: bool| {
        let length = block.len() as u16;
        let ([a, b], [c, d]) = (length.to_le_bytes(), (!length).to_le_bytes());
        [u8::from(last), a, b, c, d]
    };
    let blocks = chunk.chunks_exact(BLOCK);
    let rest = last.then_some(blocks.remainder());
    blocks.map(move |block| (header(block, false), block)).chain(rest.map(move |rest| (header(rest, true), rest)))
}

/// Reads the content of a gzip file as [`StoredGzip`] writes it, and of no other. What
/// is not so is an error of the kind `InvalidData`.
pub struct Reader<R> {
    input: R,
    block: Vec<u8>,
    position: usize,
    ended: bool,
    /// Of the content from the file's start; nothing when reading began at a later block.
    sums: Option<(crc32fast::Hasher, u64)>,
}

impl<R: Read> Reader<R> {
    /// Reads from the start of the file.
    ///
    /// # Errors
    /// When it cannot be read or starts with something else.
    pub fn new(mut input: R) -> io::Result<Self> {
        let mut header = [0; HEADER.len()];
        input.read_exact(&mut header)?;
        if header != HEADER {
            return Err(invalid("it does not start as a layer of an oscontainer does"));
        }
        Ok(Self { sums: Some((crc32fast::Hasher::new(), 0)), ..Self::at_block(input) })
    }

    /// Reads from the start of a block on; CRC-32 and length are not looked at.
    pub fn at_block(input: R) -> Self {
        Self { input, block: Vec::new(), position: 0, ended: false, sums: None }
    }

    /// Reads what follows the content, and requires that nothing more comes.
    ///
    /// # Errors
    /// When there is more content, when CRC-32 or length are wrong, or reading fails.
    pub fn finish(mut self) -> io::Result<R> {
        if self.read(&mut [0])? != 0 {
            return Err(invalid("it goes on after its end"));
        }
        if self.input.read(&mut [0])? != 0 {
            return Err(invalid("the file goes on after its end"));
        }
        Ok(self.input)
    }

    fn next_block(&mut self) -> io::Result<()> {
        let mut header = [0; 5];
        self.input.read_exact(&mut header)?;
        let [last, a, b, c, d] = header;
        let length = u16::from_le_bytes([a, b]);
        let full = usize::from(length) == BLOCK;
        if last > 1 || u16::from_le_bytes([c, d]) != !length || (last == 0) != full {
            return Err(invalid("it is not made of stored blocks as a layer of an oscontainer is"));
        }
        self.block.resize(length.into(), 0);
        self.position = 0;
        self.input.read_exact(&mut self.block)?;
        if let Some((crc, total)) = &mut self.sums {
            crc.update(&self.block);
            *total += u64::from(length);
        }
        if last == 1 {
            self.ended = true;
            if let Some((crc, total)) = self.sums.take() {
                let mut trailer = [0; TRAILER as usize];
                self.input.read_exact(&mut trailer)?;
                if trailer[..4] != crc.finalize().to_le_bytes() || trailer[4..] != (total as u32).to_le_bytes() {
                    return Err(invalid("its CRC-32 or its length is wrong"));
                }
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.block.len() {
            if self.ended || buffer.is_empty() {
                return Ok(0);
            }
            self.next_block()?;
        }
        let count = buffer.len().min(self.block.len() - self.position);
        buffer[..count].copy_from_slice(&self.block[self.position..][..count]);
        self.position += count;
        Ok(count)
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

/// Hashes in a thread of its own what is read through it.
pub struct Hashing<R> {
    input: R,
    chunk: Chunk,
    buffers: Buffers,
    thread: HashThread,
}

impl<R: Read> Hashing<R> {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(input: R) -> io::Result<Self> {
        let mut buffers = Buffers::default();
        Ok(Self { input, chunk: buffers.take(), buffers, thread: HashThread::start()? })
    }

    /// The digest of what was read, and the reader.
    ///
    /// # Errors
    /// None that can happen, unless the thread died.
    pub fn finish(mut self) -> io::Result<(Digest, R)> {
        self.thread.update(Piece::Plain(self.buffers.lend(self.chunk)))?;
        Ok((self.thread.finish()?, self.input))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        let mut read = &buffer[..count];
        while !read.is_empty() {
            self.chunk.fill(&mut read)?;
            if self.chunk.is_full() {
                let next = self.buffers.take();
                let chunk = self.buffers.lend(std::mem::replace(&mut self.chunk, next));
                self.thread.update(Piece::Plain(chunk))?;
            }
        }
        Ok(count)
    }
}

/// Up to [`CHUNK`] bytes.
struct Chunk {
    buffer: Vec<u8>,
    filled: usize,
}

impl Chunk {
    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    fn is_full(&self) -> bool {
        self.filled == CHUNK
    }

    /// Reads once into what is free, which must not be nothing.
    fn fill(&mut self, input: &mut (impl Read + ?Sized)) -> io::Result<usize> {
        loop {
            match input.read(&mut self.buffer[self.filled..]) {
                Ok(count) => {
                    self.filled += count;
                    return Ok(count);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// The chunks that threads may still read; the oldest is the first that is free again, so that memory is not
/// taken anew for each.
#[derive(Default)]
struct Buffers(VecDeque<Arc<Chunk>>);

impl Buffers {
    fn take(&mut self) -> Chunk {
        let oldest = self.0.front().is_some_and(|oldest| Arc::strong_count(oldest) == 1);
        let free = if oldest { self.0.pop_front().and_then(Arc::into_inner) } else { None };
        free.map_or_else(|| Chunk { buffer: vec![0; CHUNK], filled: 0 }, |free| Chunk { filled: 0, ..free })
    }

    fn lend(&mut self, chunk: Chunk) -> Arc<Chunk> {
        let chunk = Arc::new(chunk);
        self.0.push_back(Arc::clone(&chunk));
        chunk
    }
}

/// What is hashed.
enum Piece {
    Few(Vec<u8>),
    Plain(Arc<Chunk>),
    /// As blocks; the last ones if so.
    Framed(Arc<Chunk>, bool),
}

/// SHA-256 in a thread of its own.
struct HashThread {
    pieces: SyncSender<Piece>,
    thread: JoinHandle<Digest>,
}

impl HashThread {
    fn start() -> io::Result<Self> {
        let (pieces, received) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("sha256".into()).spawn(move || {
            let mut hasher = Hasher::new();
            for piece in received {
                match piece {
                    Piece::Few(bytes) => hasher.update(&bytes),
                    Piece::Plain(chunk) => hasher.update(chunk.bytes()),
                    Piece::Framed(chunk, last) => {
                        for (header, block) in frames(chunk.bytes(), last) {
                            hasher.update(&header);
                            hasher.update(block);
                        }
                    }
                }
            }
            hasher.digest()
        })?;
        Ok(Self { pieces, thread })
    }

    fn update(&self, piece: Piece) -> io::Result<()> {
        self.pieces.send(piece).map_err(|_| io::Error::other("the hashing thread ended early"))
    }

    fn finish(self) -> io::Result<Digest> {
        drop(self.pieces);
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

            let mut reader = Reader::new(&file[..]).unwrap();
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            assert!(back == content && reader.finish().is_ok(), "{length}");
            let middle = length / 2;
            let (block, within) = locate(middle as u64);
            let mut back = Vec::new();
            Reader::at_block(&file[block as usize..]).read_to_end(&mut back).unwrap();
            assert!(back[within as usize..] == content[middle..], "{length}");
            let until = (length / 3..middle).last().unwrap_or(middle);
            let (block, within) = locate((length / 3) as u64);
            let part = &file[block as usize..file.len().min(end(until as u64) as usize)];
            let mut back = vec![0; until - length / 3];
            let mut reader = Reader::at_block(part);
            io::copy(&mut reader.by_ref().take(within), &mut io::sink()).unwrap();
            reader.read_exact(&mut back).unwrap();
            assert!(back == content[length / 3..until], "{length}");

            let read = |bytes: &[u8]| {
                let mut reader = Reader::new(bytes)?;
                io::copy(&mut reader, &mut io::sink())?;
                reader.finish().map(|_| ())
            };
            let more = [&file[..], b"x"].concat();
            let cut = &file[..file.len() - 1];
            assert!(read(&file).is_ok() && read(&more).is_err() && read(cut).is_err(), "{length}");
            for place in [0, 10, 11, 13, file.len() - 8, file.len() - 1] {
                let mut changed = file.clone();
                changed[place] ^= 1;
                assert!(read(&changed).is_err(), "{length} {place}");
            }
        }
    }
}

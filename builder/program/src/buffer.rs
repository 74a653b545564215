//! The memory of what is on its way to clients. What a thousand connections are made of stays for long, and where
//! it is cut from memory that large buffers have left, all of that stays in use; so large buffers are few, and kept.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes that can be had at any time.
const LEAST: usize = 1 << 10;
/// Bytes in small buffers from which on no more is copied.
const COPIES: usize = 1 << 20;
/// Bytes in small buffers.
static SMALL: AtomicUsize = AtomicUsize::new(0);
static MIDDLE: Kept = Kept::new(8 << 10, 128);
static LARGE: Kept = Kept::new(128 << 10, 8);

/// Buffers of one size.
struct Kept {
    /// Bytes of each.
    size: usize,
    /// How many there may be.
    most: usize,
    state: Mutex<State>,
}

struct State {
    /// The one that was used last is taken first.
    free: Vec<Vec<u8>>,
    made: usize,
}

impl Kept {
    const fn new(size: usize, most: usize) -> Self {
        Self { size, most, state: Mutex::new(State { free: Vec::new(), made: 0 }) }
    }

    /// One for `length` bytes, or for as many as it has, if one is free.
    fn take(&'static self, length: usize) -> Option<Buffer> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = match state.free.pop() {
            Some(bytes) => bytes,
            None if state.made < self.most => {
                state.made += 1;
                vec![0; self.size]
            }
            None => return None,
        };
        Some(Buffer { bytes, length: length.min(self.size), home: Some(self) })
    }
}

/// Bytes on their way to a client; dropped, their memory is free for others.
pub struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    /// Where the memory goes when it is free.
    home: Option<&'static Kept>,
}

impl Buffer {
    /// These bytes, in no more memory than they need; none while others have too much of it.
    pub fn copy(bytes: &[u8]) -> Option<Self> {
        (SMALL.load(Ordering::Relaxed) < COPIES).then(|| Self::small(bytes.to_vec()))
    }

    /// One of `length` bytes; none while others have too many, or where no buffer is as large.
    pub fn exact(length: usize) -> Option<Self> {
        [&MIDDLE, &LARGE].into_iter().filter(|kept| length <= kept.size).find_map(|kept| kept.take(length))
    }

    /// One of `length` bytes, or of as many of them as can be had now. The `last` one, which is not in use any more,
    /// gives its memory, so that thousands of small ones do not go to and fro.
    pub fn up_to(length: u64, last: Option<Self>) -> Self {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        // A large one is free for all from here on.
        let last = last.filter(|last| last.home.is_none() && last.bytes.len() >= length.min(LEAST));
        let kept: &[&'static Kept] = match length {
            ..=LEAST => &[],
            _ if length <= MIDDLE.size => &[&MIDDLE],
            _ => &[&LARGE, &MIDDLE],
        };
        kept.iter().find_map(|kept| kept.take(length)).unwrap_or_else(|| {
            let mut small = last.unwrap_or_else(|| Self::small(vec![0; length.min(LEAST)]));
            small.length = length.min(small.bytes.len());
            small
        })
    }

    fn small(bytes: Vec<u8>) -> Self {
        SMALL.fetch_add(bytes.len(), Ordering::Relaxed);
        Self { length: bytes.len(), bytes, home: None }
    }

    /// Keeps the first `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        match self.home {
            Some(home) => home.state.lock().unwrap_or_else(PoisonError::into_inner).free.push(bytes),
            None => {
                SMALL.fetch_sub(bytes.len(), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_few_and_small_ones_many() {
        let many: Vec<_> = (0..200).map(|_| Buffer::up_to(1 << 30, None)).collect();
        let lengths = |length: usize| move |buffer: &&Buffer| buffer.len() == length;
        assert_eq!(many.iter().filter(lengths(LARGE.size)).count(), LARGE.most);
        assert_eq!(many.iter().filter(lengths(MIDDLE.size)).count(), MIDDLE.most);
        assert_eq!(many.iter().filter(lengths(LEAST)).count(), 200 - LARGE.most - MIDDLE.most);
        assert!(Buffer::exact(1).is_none());
        let small = Buffer::up_to(1 << 30, None);
        let place = small.as_ptr();
        let mut again = Buffer::up_to(20, Some(small));
        assert_eq!((again.as_ptr(), again.len()), (place, 20));
        again.truncate(10);
        assert_eq!(again.len(), 10);
        assert_eq!(Buffer::up_to(1 << 30, Some(again)).len(), LEAST);
        drop(many);
        assert_eq!(Buffer::up_to(20_000, None).len(), 20_000);
        assert_eq!(Buffer::exact(LARGE.size).map(|buffer| buffer.len()), Some(LARGE.size));
        assert!(Buffer::exact(LARGE.size + 1).is_none());
    }

    #[test]
    fn copies_are_limited() {
        let copies: Vec<_> = std::iter::from_fn(|| Buffer::copy(&[7; 10_000])).collect();
        // The other test's small buffers count, too.
        assert!((90..=COPIES / 10_000 + 1).contains(&copies.len()), "{}", copies.len());
        assert!(copies.iter().all(|copy| **copy == [7; 10_000]));
        drop(copies);
        assert_eq!(Buffer::copy(b"abc").as_deref(), Some(&b"abc"[..]));
    }
}

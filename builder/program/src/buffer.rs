//! The memory of what is on its way to clients. What a thousand connections are made of stays for long, and where
//! it is cut from memory that large buffers have left, all of that stays in use; so large buffers are few, and kept.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes that can be had at any time.
const LEAST: usize = 1 << 10;
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
    /// One of `length` bytes; none while others have too many, or where no buffer is as large.
    pub fn exact(length: usize) -> Option<Self> {
        if length <= LEAST {
            return Some(Self::small(length));
        }
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
            let mut small = last.unwrap_or_else(|| Self::small(length.min(LEAST)));
            small.length = length.min(small.bytes.len());
            small
        })
    }

    fn small(length: usize) -> Self {
        Self { bytes: vec![0; length], length, home: None }
    }

    /// Keeps the first `length` bytes; where they are few, others get the memory.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if self.home.is_some() && self.length <= LEAST {
            *self = Self { bytes: self.to_vec(), length: self.length, home: None };
        }
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
        if let Some(home) = self.home {
            home.state.lock().unwrap_or_else(PoisonError::into_inner).free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_few_and_small_ones_many() {
        let mut many: Vec<_> = (0..200).map(|_| Buffer::up_to(1 << 30, None)).collect();
        let lengths = |length: usize| move |buffer: &&Buffer| buffer.len() == length;
        assert_eq!(many.iter().filter(lengths(LARGE.size)).count(), LARGE.most);
        assert_eq!(many.iter().filter(lengths(MIDDLE.size)).count(), MIDDLE.most);
        assert_eq!(many.iter().filter(lengths(LEAST)).count(), 200 - LARGE.most - MIDDLE.most);
        assert!(Buffer::exact(LEAST + 1).is_none() && Buffer::exact(LARGE.size + 1).is_none());
        assert_eq!(Buffer::exact(LEAST).map(|buffer| buffer.len()), Some(LEAST));
        assert_eq!(Buffer::up_to(10, None).len(), 10);
        let small = Buffer::up_to(1 << 30, None);
        let place = small.as_ptr();
        let again = Buffer::up_to(20, Some(small));
        assert_eq!((again.as_ptr(), again.len()), (place, 20));
        assert_eq!(Buffer::up_to(1 << 30, Some(again)).len(), LEAST);
        // What is hardly used is given back at once.
        many[0][..3].copy_from_slice(b"abc");
        many[0].truncate(3);
        assert_eq!(many[0].as_ref(), b"abc");
        assert_eq!(Buffer::exact(LARGE.size).map(|buffer| buffer.len()), Some(LARGE.size));
        drop(many);
        assert_eq!(Buffer::up_to(20_000, None).len(), 20_000);
    }
}

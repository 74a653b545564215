//! The memory of what is on its way to clients. What a thousand connections are made of stays for long, and where
//! it is cut from memory that large buffers have left, all of that stays in use; so large buffers are few, and kept.

use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a file that can be had at any time.
const LEAST: usize = 1 << 10;
/// For files.
static MIDDLE: Kept = Kept::new(8 << 10, 128);
static LARGE: Kept = Kept::new(128 << 10, 8);
/// For what is sent whole.
static WHOLE: Kept = Kept::new(64 << 10, 8);
/// Bytes in copies from which on no more are made.
const COPIES: usize = 1 << 20;
/// Bytes in copies.
static COPIED: AtomicUsize = AtomicUsize::new(0);

/// Buffers of one size.
struct Kept {
    /// Bytes of each.
    size: usize,
    /// How many there may be.
    most: usize,
    state: Mutex<State>,
    /// Whether somebody got none.
    wanted: AtomicBool,
}

struct State {
    /// The one that was used last is taken first.
    free: Vec<Vec<u8>>,
    made: usize,
}

impl Kept {
    const fn new(size: usize, most: usize) -> Self {
        let state = Mutex::new(State { free: Vec::new(), made: 0 });
        Self { size, most, state, wanted: AtomicBool::new(false) }
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
            None => {
                self.wanted.store(true, Ordering::Relaxed);
                return None;
            }
        };
        Some(Buffer { bytes, length: length.min(self.size), home: Home::Kept(self) })
    }
}

/// Where memory goes when it is free.
#[derive(Clone, Copy)]
enum Home {
    Kept(&'static Kept),
    /// It counted in [`COPIED`].
    Copy,
    Nowhere,
}

/// Bytes on their way to a client; dropped, their memory is free for others.
pub struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    home: Home,
}

impl Buffer {
    /// Whether [`Self::copy`] gives one now.
    pub fn may_copy() -> bool {
        COPIED.load(Ordering::Relaxed) < COPIES
    }

    /// These bytes, in no more memory than they need; none while others have too much of it.
    pub fn copy(bytes: &[u8]) -> Option<Self> {
        Self::may_copy().then(|| {
            COPIED.fetch_add(bytes.len(), Ordering::Relaxed);
            Self { bytes: bytes.to_vec(), length: bytes.len(), home: Home::Copy }
        })
    }

    /// One of `length` bytes for what is sent whole; none while others have too many, or where it is too much.
    pub fn whole(length: usize) -> Option<Self> {
        if length <= WHOLE.size { WHOLE.take(length) } else { None }
    }

    /// One for the next of `length` bytes of a file, of as many of them as can be had now. The `last` one, which is not
    /// in use any more, gives its memory, so that thousands of small ones do not go to and fro.
    pub fn up_to(length: u64, last: Option<Self>) -> Self {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let kept: &[&'static Kept] = match length {
            ..=LEAST => &[],
            _ if length <= MIDDLE.size => &[&MIDDLE],
            _ => &[&LARGE, &MIDDLE],
        };
        // Who had a large one lets others have it.
        let had = last.as_ref().map(|last| last.home);
        let had = |kept: &Kept| matches!(had, Some(Home::Kept(home)) if ptr::eq(home, kept));
        let last = last.filter(|last| matches!(last.home, Home::Nowhere) && last.bytes.len() >= length.min(LEAST));
        let mut may = kept.iter().filter(|kept| !had(kept) || !kept.wanted.swap(false, Ordering::Relaxed));
        may.find_map(|kept| kept.take(length)).unwrap_or_else(|| {
            let bytes = last.map_or_else(|| vec![0; length.min(LEAST)], |mut last| std::mem::take(&mut last.bytes));
            Self { length: length.min(bytes.len()), bytes, home: Home::Nowhere }
        })
    }

    /// Whether it is so little that a read of it may be waited for.
    pub fn is_small(&self) -> bool {
        self.bytes.len() < LARGE.size
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
            Home::Kept(home) => home.state.lock().unwrap_or_else(PoisonError::into_inner).free.push(bytes),
            Home::Copy => {
                COPIED.fetch_sub(bytes.len(), Ordering::Relaxed);
            }
            Home::Nowhere => {}
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
        // A small one is used again.
        let small = many.pop().unwrap();
        let place = small.as_ptr();
        let mut again = Buffer::up_to(20, Some(small));
        assert_eq!((again.as_ptr(), again.len()), (place, 20));
        again.truncate(10);
        assert_eq!(again.len(), 10);
        assert_eq!(Buffer::up_to(1 << 30, Some(again)).len(), LEAST);
        // A large one goes round.
        let large = many.swap_remove(0);
        assert_eq!(large.len(), LARGE.size);
        let after = Buffer::up_to(1 << 30, Some(large));
        assert_eq!(after.len(), LEAST, "others wanted one of that size, and there is none of the next");
        assert_eq!(Buffer::up_to(1 << 30, many.pop()).len(), LARGE.size);
        drop(many);
        let mut alone = Buffer::up_to(20_000, None);
        for _ in 0..3 {
            alone = Buffer::up_to(20_000, Some(alone));
        }
        assert_eq!(alone.len(), 20_000, "nobody wants it");
    }

    #[test]
    fn what_is_sent_whole_is_limited() {
        let copies: Vec<_> = std::iter::from_fn(|| Buffer::copy(&[7; 10_000])).collect();
        assert_eq!(copies.len(), COPIES / 10_000 + 1);
        assert!(copies.iter().all(|copy| **copy == [7; 10_000]));
        drop(copies);
        assert_eq!(Buffer::copy(b"abc").as_deref(), Some(&b"abc"[..]));
        let whole: Vec<_> = std::iter::from_fn(|| Buffer::whole(20_000)).collect();
        assert!(whole.len() == WHOLE.most && whole.iter().all(|buffer| buffer.len() == 20_000));
        drop(whole);
        assert!(Buffer::whole(WHOLE.size).is_some() && Buffer::whole(WHOLE.size + 1).is_none());
    }
}

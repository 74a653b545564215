//! What the layers of an image hold together, told by their indexes alone: the
//! objects, the newest of each other file, and what each commit reaches.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::ObjectName;

use super::index::{FileEntry, Index};

/// Layers one upon the other, from the first.
#[derive(Debug, Default)]
pub struct Log {
    /// All objects: the layer that has the object, and its size in bytes.
    pub objects: HashMap<ObjectName, (usize, u64)>,
    /// The other files, each as the last layer that has it leaves it, and that layer.
    pub files: BTreeMap<String, (usize, FileEntry)>,
    /// All directories.
    pub directories: HashSet<String>,
    /// The commits in their order, each once, at the last layer that brings it.
    pub commits: Vec<(usize, Checksum)>,
    /// What the last commit reaches.
    pub reached: HashSet<ObjectName>,
    /// Bytes of all objects and files, those that nothing names any more too.
    pub bytes: u64,
    layers: usize,
}

impl Log {
    /// The log of the layers with these indexes.
    pub fn of<'a>(indexes: impl IntoIterator<Item = &'a Index>) -> Self {
        let mut log = Self::default();
        indexes.into_iter().for_each(|index| log.push(index));
        log
    }

    /// Adds a layer on top.
    pub fn push(&mut self, index: &Index) {
        let layer = self.layers;
        self.layers += 1;
        self.directories.extend(index.directories.iter().cloned());
        for (name, size) in &index.objects {
            self.objects.insert(*name, (layer, *size));
            self.bytes = self.bytes.saturating_add(*size);
        }
        for file in &index.files {
            self.files.insert(file.path.clone(), (layer, file.clone()));
            self.bytes = self.bytes.saturating_add(file.size);
        }
        if let Some(commit) = index.commit {
            self.commits.retain(|(_, earlier)| *earlier != commit);
            self.commits.push((layer, commit));
            follow(&mut self.reached, index);
        }
    }

    /// The step from what the last commit reaches to `reached`: what is dropped, and what
    /// of earlier commits comes back; both sorted.
    pub fn step(&self, reached: &BTreeSet<ObjectName>) -> (Vec<ObjectName>, Vec<ObjectName>) {
        let mut dropped: Vec<_> = self.reached.iter().filter(|name| !reached.contains(name)).copied().collect();
        dropped.sort_unstable();
        let again = |name: &&ObjectName| self.objects.contains_key(*name) && !self.reached.contains(*name);
        (dropped, reached.iter().filter(again).copied().collect())
    }

    /// Whether the newest version of `file` is this one.
    pub fn has(&self, file: &FileEntry) -> bool {
        self.files.get(&file.path).is_some_and(|(_, newest)| newest == file)
    }
}

/// What the commit of layer number `layer` reaches.
pub fn reached_at<'a>(indexes: impl IntoIterator<Item = &'a Index>, layer: usize) -> HashSet<ObjectName> {
    let mut reached = HashSet::new();
    for index in indexes.into_iter().take(layer + 1).filter(|index| index.commit.is_some()) {
        follow(&mut reached, index);
    }
    reached
}

/// From what the commit before reaches to what the commit of `index` reaches.
fn follow(reached: &mut HashSet<ObjectName>, index: &Index) {
    for name in &index.dropped {
        reached.remove(name);
    }
    reached.extend(index.restored.iter().chain(index.objects.keys()));
}

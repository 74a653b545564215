//! The closure of a commit: every object that it reaches is there, and every
//! object that is there is reached.

use std::collections::{HashMap, HashSet};

use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{ObjectName, Type};

use super::Links;

/// Walks from `commit` through `objects`, which have each been verified.
///
/// # Errors
/// When an object is missing, or one is not reached; the error names it.
pub fn check(commit: &Checksum, objects: Vec<(ObjectName, Links)>) -> Result<(), Rejected> {
    let objects: HashMap<_, _> = objects.into_iter().collect();
    let mut reached = HashSet::new();
    let mut waiting = vec![ObjectName::new(*commit, Type::Commit)];
    while let Some(name) = waiting.pop() {
        if !reached.insert(name) {
            continue;
        }
        match objects.get(&name) {
            None => return Err(Rejected::new(format!("object {name} is missing in the tarball"))),
            Some(links) => waiting.extend(links.names()),
        }
    }
    reached.insert(ObjectName::new(*commit, Type::CommitMeta));
    match objects.keys().filter(|name| !reached.contains(name)).min() {
        Some(name) => {
            Err(Rejected::new(format!("object {name} in the tarball is not reached from the commit {commit}")))
        }
        None => Ok(()),
    }
}

//! What an object store needs now and then: the check at the start, and the removal of what
//! nobody will use.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::Result;
use futures_util::{StreamExt, TryStreamExt};
use oscontainer_artifact::digest::Digest;

use super::{AT_ONCE, INDEX, Listed, Marker, Objects, below, index_path, segment_path, segments_path};
use crate::endpoint::store::record::{Id, RECORD, Record, digest_of, file_name};
use crate::endpoint::store::segments::Index;

/// The paths of what a complete version needs, given its tarball's index.
pub fn needed(id: &Id, record: &Record, index: &Index) -> HashSet<String> {
    let dir = below("artifacts", id);
    let mut needed: HashSet<_> =
        index.segments.iter().map(|segment| segment_path(id, &index.upload, segment)).collect();
    needed.extend([format!("{dir}{RECORD}"), format!("{dir}{}", file_name(&record.manifest_digest))]);
    needed.insert(index_path(id, &record.digest));
    needed
}

impl Objects {
    /// What a complete version needs, or else what is wrong with it, given what is listed of it and
    /// how large it is. Where a listing lags behind, the objects are asked.
    async fn condition(
        &self,
        id: &Id,
        record: &Record,
        listed: &HashMap<&str, u64>,
    ) -> Result<Result<HashSet<String>, String>> {
        let path = index_path(id, &record.digest);
        let Some(bytes) = self.get(&path).await? else { return Ok(Err(format!("{path} is missing"))) };
        let index = match Index::parse(&bytes) {
            Ok(index) => index,
            Err(error) => return Ok(Err(format!("reading {path}: {error:#}"))),
        };
        if index.size() != record.size {
            return Ok(Err(format!("its segments have {} bytes, not {}", index.size(), record.size)));
        }
        let manifest = format!("{}{}", below("artifacts", id), file_name(&record.manifest_digest));
        let segments = index.segments.iter().map(|segment| (segment_path(id, &index.upload, segment), segment.length));
        for (path, size) in segments.chain([(manifest, record.manifest_size)]) {
            if listed.get(path.as_str()) == Some(&size) {
                continue;
            }
            match self.size(&path).await? {
                Some(found) if found == size => {}
                Some(found) => return Ok(Err(format!("{path} has {found} bytes, not {size}"))),
                None => return Ok(Err(format!("{path} is missing"))),
            }
        }
        Ok(Ok(needed(id, record, &index)))
    }

    /// Removes what complete versions do not need, and what is left of damaged ones; says what is
    /// wrong with which. One listing, and a read for each version; no tarball is read.
    pub(super) async fn recovered(&self, records: &[(Id, Record)]) -> Result<Vec<(Id, String)>> {
        let mut listed = Vec::new();
        for root in ["artifacts/", "uploads/", "segments/"] {
            listed.extend(self.list(root).await?);
        }
        let sizes: HashMap<&str, u64> =
            listed.iter().map(|object| (object.path.as_str(), object.metadata.content_length())).collect();
        let checks = futures_util::stream::iter(records)
            .map(async |(id, record)| Ok::<_, anyhow::Error>((id, record, self.condition(id, record, &sizes).await?)));
        let checked: Vec<_> = checks.buffer_unordered(AT_ONCE).try_collect().await?;
        let needed: HashMap<&Id, &HashSet<String>> =
            checked.iter().filter_map(|(id, _, condition)| Some((*id, condition.as_ref().ok()?))).collect();
        let surplus = listed.iter().filter(|object| {
            let id = object.place().map(|(id, _)| id);
            id.and_then(|id| needed.get(&id)).is_some_and(|needed| !needed.contains(&object.path))
        });
        let surplus: Vec<_> = surplus.map(|object| object.path.clone()).collect();
        for path in &surplus {
            tracing::info!("removing {path}: its version is complete without it");
        }
        self.remove_all(surplus).await?;
        let mut damaged = Vec::new();
        for (id, record, condition) in checked {
            let Err(damage) = condition else { continue };
            // Published again, the version gets them anew.
            let manifest = format!("{}{}", below("artifacts", id), file_name(&record.manifest_digest));
            self.remove_all([index_path(id, &record.digest), manifest]).await?;
            damaged.push((id.clone(), damage));
        }
        Ok(damaged)
    }

    /// The uploads that are resumed, with when something was last written of them.
    async fn markers(&self) -> Result<Vec<(Listed, Id, Digest, Marker)>> {
        let mut markers = Vec::new();
        for object in self.list("uploads/").await? {
            let Some((id, digest)) = object.place().and_then(|(id, rest)| Some((id, digest_of(rest)?))) else {
                continue;
            };
            if let Some(marker) = self.marker(&id, &digest).await? {
                markers.push((object, id, digest, marker));
            }
        }
        Ok(markers)
    }

    pub(super) async fn abandoned(&self, age: Duration) -> Result<Vec<(Id, Digest)>> {
        let mut stale = Vec::new();
        for (object, id, digest, marker) in self.markers().await? {
            let segments = self.list(&segments_path(&id, &marker.upload)).await?;
            if object.is_older(age) && segments.iter().all(|segment| segment.is_older(age)) {
                stale.push((id, digest));
            }
        }
        Ok(stale)
    }

    /// Removes from a version without a record what is old, and segments that nothing refers to.
    pub(super) async fn expire_version(&self, id: &Id, age: Duration) -> Result<()> {
        let files = self.list(&below("artifacts", id)).await?;
        if files.iter().any(|file| file.path.ends_with(&format!("/{RECORD}"))) {
            return Ok(());
        }
        let (old, kept): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| file.is_older(age));
        let mut uploads = HashSet::new();
        for file in kept.iter().filter(|file| file.path.ends_with(INDEX)) {
            if let Some(bytes) = self.get(&file.path).await? {
                uploads.insert(Index::parse(&bytes)?.upload);
            }
        }
        for object in self.list(&below("uploads", id)).await? {
            if let Some(digest) = object.place().and_then(|(_, rest)| digest_of(rest))
                && let Some(marker) = self.marker(id, &digest).await?
            {
                uploads.insert(marker.upload);
            }
        }
        let mut unused: HashMap<String, Vec<Listed>> = HashMap::new();
        for object in self.list(&below("segments", id)).await? {
            let upload = object.place().and_then(|(_, rest)| rest.split_once('/')).map(|(upload, _)| upload.to_owned());
            if let Some(upload) = upload.filter(|upload| !uploads.contains(upload)) {
                unused.entry(upload).or_default().push(object);
            }
        }
        unused.retain(|_, objects| objects.iter().all(|object| object.is_older(age)));
        let paths: Vec<_> = old.into_iter().chain(unused.into_values().flatten()).map(|object| object.path).collect();
        for path in &paths {
            tracing::info!("removing {path}: its manifest has not come");
        }
        self.remove_all(paths).await
    }

    pub(super) async fn usage(&self) -> Result<u64> {
        let mut used = 0;
        let mut uploads: HashMap<(Id, String), u64> = HashMap::new();
        for object in self.list("artifacts/").await? {
            used += object.metadata.content_length();
        }
        for object in self.list("segments/").await? {
            let Some((id, rest)) = object.place() else { continue };
            let upload = rest.split('/').next().unwrap_or_default().to_owned();
            *uploads.entry((id, upload)).or_default() += object.metadata.content_length();
        }
        for (_, id, _, marker) in self.markers().await? {
            let written = uploads.entry((id, marker.upload)).or_default();
            *written = marker.length.max(*written);
        }
        Ok(used + uploads.into_values().sum::<u64>())
    }
}

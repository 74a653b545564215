//! What an object store needs now and then: the check at the start, and the removal of what
//! nobody will use.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::Result;
use futures_util::{StreamExt, TryStreamExt};

use super::{AT_ONCE, INDEX, Listed, Objects, below, index_path, segment_path, segments_path, sizes};
use crate::endpoint::store::record::{Id, RECORD, Record, file_name};
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
    /// how large it is.
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
        let damage = self.differs(segments.chain([(manifest, record.manifest_size)]), listed).await?;
        Ok(damage.map_or_else(|| Ok(needed(id, record, &index)), Err))
    }

    /// Removes what complete versions do not need, and says what is wrong with which. One listing, and a read for
    /// each version; no tarball is read.
    pub(super) async fn recovered(&self, records: &[(Id, Record)]) -> Result<Vec<(Id, String)>> {
        let mut listed = Vec::new();
        for root in ["artifacts/", "uploads/", "segments/"] {
            listed.extend(self.list(root).await?);
        }
        let sizes = sizes(&listed);
        let checks = futures_util::stream::iter(records)
            .map(async |(id, record)| Ok::<_, anyhow::Error>((id, record, self.condition(id, record, &sizes).await?)));
        let checked: Vec<_> = checks.buffer_unordered(AT_ONCE).try_collect().await?;
        let mut found: HashMap<Id, Vec<&str>> = HashMap::new();
        for object in &listed {
            if let Some((id, _)) = object.place() {
                found.entry(id).or_default().push(&object.path);
            }
        }
        let mut damaged = Vec::new();
        for (id, record, condition) in checked {
            let needed = match condition {
                Ok(needed) => needed,
                Err(damage) => {
                    damaged.push((id.clone(), damage));
                    continue;
                }
            };
            let found = found.remove(id).unwrap_or_default();
            let surplus: Vec<_> = found.into_iter().filter(|path| !needed.contains(*path)).collect();
            // Another endpoint may have made it anew since it was looked at.
            if surplus.is_empty() || self.record(id).await?.as_ref() != Some(record) {
                continue;
            }
            for path in &surplus {
                tracing::info!("removing {path}: its version is complete without it");
            }
            self.remove_all(surplus.into_iter().map(str::to_owned)).await?;
        }
        Ok(damaged)
    }

    async fn record(&self, id: &Id) -> Result<Option<Record>> {
        let bytes = self.get(&format!("{}{RECORD}", below("artifacts", id))).await?;
        Ok(bytes.and_then(|bytes| Record::parse(&bytes, id).ok()))
    }

    /// Removes from a version without a record what is old, and segments that nothing refers to.
    pub(super) async fn expire_version(&self, id: &Id, age: Duration) -> Result<()> {
        if self.get(&format!("{}{RECORD}", below("artifacts", id))).await?.is_some() {
            return Ok(());
        }
        let files = self.list(&below("artifacts", id)).await?;
        let (old, kept): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| file.is_older(age));
        let mut uploads = HashSet::new();
        for file in kept.iter().filter(|file| file.path.ends_with(INDEX)) {
            if let Some(bytes) = self.get(&file.path).await? {
                uploads.insert(Index::parse(&bytes)?.upload);
            }
        }
        for object in self.list(&below("uploads", id)).await? {
            if let Some((_, digest)) = object.upload()
                && let Some(marker) = self.marker(id, &digest).await?
            {
                uploads.insert(marker.upload);
            }
        }
        let under_way: HashSet<_> = self.promises.all().keys().cloned().collect();
        let mut unused: HashMap<String, Vec<Listed>> = HashMap::new();
        for object in self.list(&below("segments", id)).await? {
            let upload = object.place().and_then(|(_, rest)| rest.split_once('/')).map(|(upload, _)| upload.to_owned());
            let is_used = |upload: &String| uploads.contains(upload) || under_way.contains(&segments_path(id, upload));
            if let Some(upload) = upload.filter(|upload| !is_used(upload)) {
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
        // By the path of their segments.
        let mut uploads: HashMap<String, u64> = HashMap::new();
        for object in self.list("artifacts/").await? {
            used += object.metadata.content_length();
        }
        for object in self.list("segments/").await? {
            let Some((id, rest)) = object.place() else { continue };
            let path = segments_path(&id, rest.split('/').next().unwrap_or_default());
            *uploads.entry(path).or_default() += object.metadata.content_length();
        }
        let mut promised: Vec<_> = self.promises.all().iter().map(|(path, length)| (path.clone(), *length)).collect();
        for (id, digest) in self.list("uploads/").await?.iter().filter_map(Listed::upload) {
            if let Some(marker) = self.marker(&id, &digest).await? {
                promised.push((segments_path(&id, &marker.upload), marker.length));
            }
        }
        for (path, length) in promised {
            let written = uploads.entry(path).or_default();
            *written = length.max(*written);
        }
        Ok(used + uploads.into_values().sum::<u64>())
    }
}

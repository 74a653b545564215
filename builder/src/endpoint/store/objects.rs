//! Artifacts in an object store. Small files are objects, tarballs are segments and an index
//! (segments.rs); nothing is ever overwritten with other bytes.
//!
//!     PREFIX/artifacts/NAME/VERSION/sha256-HEX       a manifest
//!     PREFIX/artifacts/NAME/VERSION/sha256-HEX.index a tarball: which segments make it
//!     PREFIX/uploads/NAME/VERSION/sha256-HEX         an upload that is resumed: its id and length
//!     PREFIX/segments/NAME/VERSION/ID/…              what uploads wrote
//!     PREFIX/lock                                    on stores that cannot create conditionally

mod upkeep;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use opendal::{ErrorKind, Metadata, Operator};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::Name;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::backend::{Backend, Partial, Promise, Promises, Sink, Source, Stored};
use super::lease::Lease;
use super::record::{Id, RECORD, Record, digest_of, file_name};
use super::segments::{Index, Segment, Segments, Writer, chain, random};
use super::upload::Hashed;
use super::{Failure, Interrupted};

/// Requests to the store at the same time, where many objects are looked at.
const AT_ONCE: usize = 64;

/// An object store's operators: the same place, reached in different ways.
#[derive(Clone)]
pub struct Operators {
    /// Tries again what may pass.
    pub patient: Operator,
    /// Tries once.
    pub once: Operator,
}

/// A bucket or container, below a prefix.
#[derive(Clone)]
pub struct Objects {
    operators: Operators,
    runtime: Handle,
    /// Held where the store cannot create conditionally.
    lease: Option<Arc<Lease>>,
    /// The uploads in one request, by the path of their segments.
    promises: Promises,
    records: Arc<Mutex<Records>>,
}

/// The records that were read, by name, with what tells them from others under the same name.
type Records = HashMap<String, (String, Vec<u8>)>;

/// What there is of an upload, besides its segments.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    upload: String,
    length: u64,
}

/// One object in a listing: its path in parts, without the prefix.
struct Listed {
    path: String,
    metadata: Metadata,
}

impl Listed {
    /// The version and the rest of the path; `None` for what nobody here has written.
    fn place(&self) -> Option<(Id, &str)> {
        let mut parts = self.path.splitn(4, '/').skip(1);
        let (name, version) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some((Id { name, version }, parts.next()?))
    }

    /// The upload that it is the marker of.
    fn upload(&self) -> Option<(Id, Digest)> {
        let (id, file) = self.place()?;
        Some((id, digest_of(file)?))
    }

    fn is_older(&self, age: Duration) -> bool {
        let modified = self.metadata.last_modified().map(SystemTime::from);
        modified.is_some_and(|time| SystemTime::now().duration_since(time).is_ok_and(|since| since >= age))
    }
}

impl Objects {
    /// Opens the store, and finds out whether it can create conditionally. `shown` is its URI.
    ///
    /// # Errors
    /// When it does not answer, or another endpoint serves it and it cannot have two.
    pub fn open(operators: Operators, shown: &str) -> Result<Self> {
        let runtime = Handle::current();
        let (promises, records) = (Promises::default(), Arc::default());
        let mut store = Self { operators, runtime, lease: None, promises, records };
        if !store.creates_conditionally().with_context(|| format!("using the store {shown}"))? {
            tracing::warn!(
                "the store {shown} cannot create an object only where there is none: \
                 only one replica of the endpoint may run on it"
            );
            let lease = Lease::take(store.operators.patient.clone(), &store.runtime, shown)?;
            store.lease = Some(Arc::new(lease));
        }
        Ok(store)
    }

    /// Whether of two creates the second fails.
    fn creates_conditionally(&self) -> Result<bool> {
        let probe = format!("probe-{:016x}", random());
        self.wait(async {
            let first = self.conditionally(&probe, b"first").await;
            let second = match first {
                Ok(true) => self.conditionally(&probe, b"second").await,
                other => other,
            };
            let unsupported = |error: &opendal::Error| {
                error.kind() == ErrorKind::Unsupported || error.to_string().contains("NotImplemented")
            };
            let creates = match (second, self.store().read(&probe).await) {
                (Ok(created), Ok(content)) => Ok(!created && content.to_vec() == b"first"),
                (Err(error), _) if unsupported(&error) => Ok(false),
                (Err(error), _) | (_, Err(error)) => Err(error),
            };
            self.store().delete(&probe).await?;
            Ok(creates?)
        })
    }

    /// Creates an object; false if there is one.
    async fn conditionally(&self, path: &str, bytes: &[u8]) -> opendal::Result<bool> {
        let bytes = Bytes::copy_from_slice(bytes);
        match self.store().write_with(path, bytes).if_not_exists(true).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::ConditionNotMatch => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates an object; false if there is another one. The answer to a create may be lost
    /// and the create tried again: what is there then is what was sent.
    async fn created(&self, path: &str, bytes: &[u8]) -> Result<bool> {
        let created = match &self.lease {
            None => self.conditionally(path, bytes).await?,
            Some(_) => {
                let create = async {
                    let free = self.get(path).await?.is_none();
                    if free {
                        self.store().write(path, Bytes::copy_from_slice(bytes)).await?;
                    }
                    Ok(free)
                };
                self.held(create).await?
            }
        };
        Ok(created || self.get(path).await?.is_some_and(|there| there == bytes))
    }

    /// Changes something: as long as the lock is held, where there is one.
    async fn held<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match &self.lease {
            None => work.await,
            Some(lease) => lease.during(work).await,
        }
    }

    fn store(&self) -> &Operator {
        &self.operators.patient
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    async fn get(&self, path: &str) -> Result<Option<Vec<u8>>> {
        match self.store().read(path).await {
            Ok(content) => Ok(Some(content.to_vec())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {path}")),
        }
    }

    /// The size of an object.
    async fn size(&self, path: &str) -> Result<Option<u64>> {
        match self.store().stat(path).await {
            Ok(metadata) => Ok(Some(metadata.content_length())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("looking at {path}")),
        }
    }

    /// The objects below a path that ends with a slash.
    async fn list(&self, path: &str) -> Result<Vec<Listed>> {
        let entries = self.store().list_with(path).recursive(true).await;
        let entries = entries.with_context(|| format!("listing {path}"))?.into_iter().map(opendal::Entry::into_parts);
        Ok(entries
            .filter(|(_, metadata)| metadata.is_file())
            .map(|(path, metadata)| Listed { path, metadata })
            .collect())
    }

    /// Removes objects, and segments only when all else is gone: what refers to them must not outlive them.
    async fn remove_all(&self, paths: impl IntoIterator<Item = String>) -> Result<()> {
        let (segments, others): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.starts_with("segments/"));
        for paths in [others, segments] {
            let removals = futures_util::stream::iter(paths)
                .map(async |path| self.store().delete(&path).await.with_context(|| format!("removing {path}")));
            self.held(removals.buffer_unordered(AT_ONCE).try_collect::<()>()).await?;
        }
        Ok(())
    }

    async fn index(&self, id: &Id, digest: &Digest) -> Result<Option<Index>> {
        let path = index_path(id, digest);
        let bytes = self.get(&path).await?;
        bytes.map(|bytes| Index::parse(&bytes).with_context(|| format!("reading {path}"))).transpose()
    }

    /// The index of a tarball all of whose segments are there. What is wrong with another one is in the log.
    async fn whole_index(&self, id: &Id, digest: &Digest) -> Result<Option<Index>> {
        let path = index_path(id, digest);
        let Some(bytes) = self.get(&path).await? else { return Ok(None) };
        let damage = match Index::parse(&bytes) {
            Err(error) => Some(format!("{error:#}")),
            Ok(index) => match self.missing(id, &index).await? {
                None => return Ok(Some(index)),
                damage => damage,
            },
        };
        tracing::warn!("{path} does not count: {}", damage.unwrap_or_default());
        Ok(None)
    }

    /// What is missing of the segments that make a tarball.
    async fn missing(&self, id: &Id, index: &Index) -> Result<Option<String>> {
        let listed = self.list(&segments_path(id, &index.upload)).await?;
        let sizes = sizes(&listed);
        let segments = index.segments.iter().map(|segment| (segment_path(id, &index.upload, segment), segment.length));
        self.differs(segments, &sizes).await
    }

    /// The first object that is not there with its size, and what is instead, given what is listed. Where a listing
    /// lags behind, the objects are asked.
    async fn differs(
        &self,
        objects: impl Iterator<Item = (String, u64)>,
        listed: &HashMap<&str, u64>,
    ) -> Result<Option<String>> {
        for (path, size) in objects {
            if listed.get(path.as_str()) == Some(&size) {
                continue;
            }
            match self.size(&path).await? {
                Some(found) if found == size => {}
                Some(found) => return Ok(Some(format!("{path} has {found} bytes, not {size}"))),
                None => return Ok(Some(format!("{path} is missing"))),
            }
        }
        Ok(None)
    }

    /// What is known of an upload; one of which nothing can be known is none.
    async fn marker(&self, id: &Id, digest: &Digest) -> Result<Option<Marker>> {
        let path = marker_path(id, digest);
        let Some(bytes) = self.get(&path).await? else { return Ok(None) };
        let marker = serde_json::from_slice(&bytes);
        Ok(marker.inspect_err(|error| tracing::warn!("{path} does not count: {error}")).ok())
    }

    /// All that there is of a version.
    async fn everything(&self, id: &Id) -> Result<Vec<String>> {
        let mut paths = Vec::new();
        for root in ["artifacts", "uploads", "segments"] {
            paths.extend(self.list(&below(root, id)).await?.into_iter().map(|listed| listed.path));
        }
        Ok(paths)
    }

    async fn read_records(&self, name: Option<&Name>) -> Result<Vec<(Id, Vec<u8>)>> {
        let path = name.map_or("artifacts/".to_owned(), |name| format!("artifacts/{name}/"));
        let listed = self.list(&path).await?;
        let records = listed
            .iter()
            .filter_map(|object| object.place().filter(|(_, rest)| *rest == RECORD).map(|(id, _)| (object, id)));
        let reads = futures_util::stream::iter(records).map(async |(object, id)| {
            let stamp = format!("{:?} {:?}", object.metadata.etag(), object.metadata.last_modified());
            if let Some((_, bytes)) = self.known().get(&object.path).filter(|(known, _)| *known == stamp) {
                return Ok(Some((id, bytes.clone())));
            }
            let Some(bytes) = self.get(&object.path).await? else { return Ok(None) };
            self.known().insert(object.path.clone(), (stamp, bytes.clone()));
            Ok::<_, anyhow::Error>(Some((id, bytes)))
        });
        let records: Vec<_> = reads.buffered(AT_ONCE).try_collect().await?;
        if name.is_none() {
            let listed: HashSet<_> = listed.iter().map(|object| object.path.as_str()).collect();
            self.known().retain(|path, _| listed.contains(path.as_str()));
        }
        Ok(records.into_iter().flatten().collect())
    }

    fn known(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the store failed that gave this error. Quotas have a status or a code of their own:
/// Swift's 413 and 507, S3's QuotaExceeded and Ceph's and MinIO's spellings of it.
pub fn failure(error: &opendal::Error) -> Failure {
    let text = error.to_string();
    if ["status: 413", "status: 507", "QuotaExceeded", "StorageFull"].iter().any(|sign| text.contains(sign)) {
        Failure::Full
    } else if error.is_temporary() || error.is_persistent() || error.kind() == ErrorKind::RateLimited {
        Failure::Passing
    } else {
        Failure::Other
    }
}

/// The sizes of listed objects, by path.
fn sizes(listed: &[Listed]) -> HashMap<&str, u64> {
    listed.iter().map(|object| (object.path.as_str(), object.metadata.content_length())).collect()
}

/// The end of the name of a tarball's index.
const INDEX: &str = ".index";

fn below(root: &str, id: &Id) -> String {
    format!("{root}/{}/{}/", id.name, id.version)
}

fn index_path(id: &Id, digest: &Digest) -> String {
    format!("{}{}{INDEX}", below("artifacts", id), file_name(digest))
}

fn marker_path(id: &Id, digest: &Digest) -> String {
    format!("{}{}", below("uploads", id), file_name(digest))
}

fn segments_path(id: &Id, upload: &str) -> String {
    format!("{}{upload}/", below("segments", id))
}

fn segment_path(id: &Id, upload: &str, segment: &Segment) -> String {
    format!("{}{segment}", segments_path(id, upload))
}

impl Backend for Objects {
    fn check(&self) -> Result<()> {
        if let Some(lease) = &self.lease {
            lease.check()?;
        }
        // A bucket that is gone has no objects either: only a listing tells.
        self.wait(async {
            let mut listed = self.operators.once.lister_with("artifacts/").limit(1).await?;
            listed.next().await.transpose().map(drop)
        })
        .context("asking the store")
    }

    fn close(&self) {
        if let Some(lease) = &self.lease {
            lease.release(&self.runtime);
        }
    }

    fn recover(&self, records: &[(Id, Record)]) -> Result<Vec<(Id, String)>> {
        self.wait(self.recovered(records))
    }

    fn records(&self, name: Option<&Name>) -> Result<Vec<(Id, Vec<u8>)>> {
        self.wait(self.read_records(name))
    }

    fn read(&self, id: &Id, file: &str) -> Result<Option<Vec<u8>>> {
        self.wait(self.get(&format!("{}{file}", below("artifacts", id))))
    }

    fn create(&self, id: &Id, file: &str, bytes: &[u8]) -> Result<bool> {
        self.wait(self.created(&format!("{}{file}", below("artifacts", id)), bytes))
    }

    fn remove(&self, id: &Id, file: &str) -> Result<()> {
        self.wait(self.remove_all([format!("{}{file}", below("artifacts", id))]))
    }

    fn manifest(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        let path = format!("{}{}", below("artifacts", id), file_name(digest));
        let Some(size) = self.wait(self.size(&path))? else { return Ok(None) };
        let segments = Segments::new(self.store().clone(), [(path, size)].into_iter());
        Ok(Some(Stored { size, source: Source::Segments(segments) }))
    }

    fn tarball(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        let Some(index) = self.wait(self.index(id, digest))? else { return Ok(None) };
        let objects = index.segments.iter().map(|segment| (segment_path(id, &index.upload, segment), segment.length));
        let segments = Segments::new(self.store().clone(), objects);
        Ok(Some(Stored { size: index.size(), source: Source::Segments(segments) }))
    }

    fn whole(&self, id: &Id, digest: &Digest) -> Result<Option<u64>> {
        Ok(self.wait(self.whole_index(id, digest))?.map(|index| index.size()))
    }

    fn renew(&self, id: &Id, digest: &Digest) -> Result<()> {
        let path = index_path(id, digest);
        self.wait(self.held(async {
            let Some(bytes) = self.get(&path).await? else { return Ok(()) };
            self.store().write(&path, bytes).await.map(drop).with_context(|| format!("writing {path}"))
        }))
    }

    fn receive(&self, id: &Id, length: u64) -> Result<Box<dyn Sink>> {
        let upload = format!("{:016x}", random());
        let promise = self.promises.grant(segments_path(id, &upload), length);
        Ok(self.writing(id, upload, Vec::new(), Some(promise)))
    }

    fn partial(&self, id: &Id, digest: &Digest) -> Result<Option<Partial>> {
        self.wait(async {
            let Some(Marker { upload, length }) = self.marker(id, digest).await? else { return Ok(None) };
            let listed = self.list(&segments_path(id, &upload)).await?;
            let written = listed.iter().filter_map(|object| object.path.rsplit('/').next()?.parse().ok());
            let segments = chain(written.collect());
            Ok(Some(Partial { offset: segments.last().map_or(0, Segment::end), length, upload, segments }))
        })
    }

    fn begin(&self, id: &Id, digest: &Digest, length: u64) -> Result<Partial> {
        let marker = Marker { upload: format!("{:016x}", random()), length };
        let (path, bytes) = (marker_path(id, digest), serde_json::to_vec(&marker)?);
        if !self.wait(self.created(&path, &bytes))? {
            if let Some(partial) = self.partial(id, digest)? {
                return Ok(partial);
            }
            // It was given up meanwhile, or cannot be read.
            self.wait(self.remove_all([path.clone()]))?;
            if !self.wait(self.created(&path, &bytes))? {
                bail!(Interrupted("the upload was begun at the same time"));
            }
        }
        Ok(Partial { length, upload: marker.upload, ..Partial::default() })
    }

    fn append(&self, id: &Id, _digest: &Digest, partial: &Partial, hashed: &mut Hashed) -> Result<Box<dyn Sink>> {
        let Partial { offset, upload, segments, .. } = partial;
        let objects = segments.iter().map(|segment| (segment_path(id, upload, segment), segment.length));
        let written = Segments::new(self.store().clone(), objects);
        self.wait(written.hash(hashed.offset, &mut hashed.hasher))?;
        hashed.offset = *offset;
        Ok(self.writing(id, upload.clone(), segments.clone(), None))
    }

    fn cancel(&self, id: &Id, digest: &Digest) -> Result<()> {
        self.wait(async {
            let marker = self.marker(id, digest).await?;
            self.remove_all([marker_path(id, digest)]).await?;
            let Some(marker) = marker else { return Ok(()) };
            let index = self.get(&index_path(id, digest)).await?.and_then(|bytes| Index::parse(&bytes).ok());
            if index.is_some_and(|index| index.upload == marker.upload) {
                return Ok(());
            }
            let segments = self.list(&segments_path(id, &marker.upload)).await?;
            self.remove_all(segments.into_iter().map(|segment| segment.path)).await
        })
    }

    fn uploads(&self) -> Result<Vec<(Id, Digest)>> {
        let listed = self.wait(self.list("uploads/"))?;
        Ok(listed.iter().filter_map(Listed::upload).collect())
    }

    fn is_stale(&self, id: &Id, digest: &Digest, age: Duration) -> Result<bool> {
        self.wait(async {
            let markers = self.list(&below("uploads", id)).await?;
            let path = marker_path(id, digest);
            let Some(marker) = markers.iter().find(|object| object.path == path) else { return Ok(false) };
            let segments = match self.marker(id, digest).await? {
                Some(marker) => self.list(&segments_path(id, &marker.upload)).await?,
                None => Vec::new(),
            };
            Ok(marker.is_older(age) && segments.iter().all(|segment| segment.is_older(age)))
        })
    }

    fn incomplete(&self) -> Result<Vec<Id>> {
        let mut ids = HashSet::new();
        for root in ["artifacts/", "segments/"] {
            ids.extend(self.wait(self.list(root))?.iter().filter_map(|object| Some(object.place()?.0)));
        }
        for (id, _) in self.records(None)? {
            ids.remove(&id);
        }
        Ok(ids.into_iter().collect())
    }

    fn expire(&self, id: &Id, age: Duration) -> Result<()> {
        self.wait(self.expire_version(id, age))
    }

    fn sweep(&self, id: &Id, record: &Record) -> Result<()> {
        self.wait(async {
            let Some(index) = self.index(id, &record.digest).await? else { return Ok(()) };
            let needed = upkeep::needed(id, record, &index);
            let surplus = self.everything(id).await?.into_iter().filter(|path| !needed.contains(path));
            self.remove_all(surplus.collect::<Vec<_>>()).await
        })
    }

    fn delete(&self, id: &Id) -> Result<bool> {
        self.wait(async {
            // The record goes first: a version without its files must not be visible.
            let record = format!("{}{RECORD}", below("artifacts", id));
            let complete = self.get(&record).await?.is_some();
            self.remove_all([record]).await?;
            let all = self.everything(id).await?;
            let found = complete || !all.is_empty();
            self.remove_all(all).await?;
            Ok(found)
        })
    }

    fn used(&self) -> Result<u64> {
        self.wait(self.usage())
    }

    fn free(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

impl Objects {
    fn writing(&self, id: &Id, upload: String, segments: Vec<Segment>, once: Option<Promise>) -> Box<dyn Sink> {
        let path = segments_path(id, &upload);
        let writer = Writer::new(self.store().clone(), self.runtime.clone(), path, segments);
        Box::new(Writing { store: self.clone(), writer, id: id.clone(), upload, once, deleted: false })
    }
}

/// A tarball that is being written.
struct Writing {
    store: Objects,
    writer: Writer,
    id: Id,
    upload: String,
    /// What was granted to an upload in one request: nothing of it stays unless it gets its place.
    once: Option<Promise>,
    /// Whether it was seen that it will never get its place.
    deleted: bool,
}

impl Sink for Writing {
    fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        self.writer.write(chunks)
    }

    fn sync(&mut self) -> Result<()> {
        self.writer.sync()
    }

    fn place(mut self: Box<Self>, digest: &Digest) -> Result<bool> {
        let index = Index { upload: self.upload.clone(), segments: self.writer.segments().to_vec() };
        let (path, bytes) = (index_path(&self.id, digest), serde_json::to_vec(&index)?);
        let store = self.store.clone();
        store.wait(async {
            if let Some(missing) = store.missing(&self.id, &index).await? {
                tracing::info!("{path} comes to nothing: {missing}");
                self.deleted = true;
                bail!(Interrupted::DELETED);
            }
            let mut created = store.created(&path, &bytes).await?;
            if !created && store.whole_index(&self.id, digest).await?.is_none() {
                store.remove_all([path.clone()]).await?;
                created = store.created(&path, &bytes).await?;
            }
            if created {
                self.once = None;
            }
            Ok(created)
        })
    }

    fn segments(&self) -> Vec<Segment> {
        self.writer.segments().to_vec()
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if self.once.is_none() && !self.deleted {
            return;
        }
        let (store, id, upload) = (self.store.clone(), self.id.clone(), self.upload.clone());
        let paths: Vec<_> = self.writer.segments().iter().map(|segment| segment_path(&id, &upload, segment)).collect();
        self.store.runtime.spawn(async move {
            if let Err(error) = store.remove_all(paths).await {
                tracing::warn!("removing an upload that came to nothing: {error:#}");
            }
        });
    }
}

//! The image store of a node: a folder that the agent reads and `weft image` writes, safely at the same time.
//!
//! ```text
//! index.json        what is there; replaced atomically by whoever holds the lock
//! lock              flock: exclusive to change the index, shared to take an image into use
//! layers/<hex>/     one unpacked layer, named by its diff id, ready for overlayfs
//! uses/<id>         an image that a container uses
//! scratch/          unfinished work; emptied by whoever opens the store and holds the lock
//! ```

mod archive;
#[doc(hidden)]
pub mod fuzz;
mod index;
mod layer;
mod reference;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

pub use layer::LayerError;
pub use reference::Reference;

use self::archive::{Archive, Blob, Found, Hashing};
use self::index::{Index, Names, names_of};
use crate::Image;

/// Why the image store could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no such image.
    #[error("image {0:?} not found")]
    NotFound(String),
    /// A reference can't be parsed.
    #[error("invalid image reference {0:?}")]
    Reference(String),
    /// Containers use the image.
    #[error("image {image:?} is used by container {container}")]
    InUse {
        /// Reference or id.
        image: String,
        /// One of them.
        container: String,
    },
    /// The archive isn't what it should be.
    #[error("not an image archive: {0}")]
    Format(String),
    /// Content doesn't match its digest.
    #[error("content has digest {found}, not {expected}")]
    Digest {
        /// As named.
        expected: String,
        /// As read.
        found: String,
    },
    /// A layer can't be unpacked.
    #[error("cannot unpack layer {diff_id}")]
    Layer {
        /// Which.
        diff_id: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// The file system refused.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a container takes from its image. Field names are OCI's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    #[serde(default)]
    pub(crate) config: Option<Defaults>,
    pub(crate) rootfs: RootFs,
}

/// Defaults of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Defaults {
    pub(crate) user: Option<String>,
    pub(crate) env: Option<Vec<String>>,
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) cmd: Option<Vec<String>>,
    pub(crate) working_dir: Option<String>,
    pub(crate) stop_signal: Option<String>,
}

/// The layers, the lowest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Vec<String>,
}

/// Tells one version of the index file from another.
type Version = (u64, i64, i64, u64);

/// An image resolved for a container.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) id: String,
    pub(crate) defaults: Defaults,
    /// Folders' names in the layer folder, the topmost first.
    pub(crate) layers: Vec<String>,
}

/// The store. Calls block on disk: from async code they belong on a blocking thread.
#[derive(Debug)]
pub struct ImageStore {
    folder: PathBuf,
    cached: Mutex<Option<(Version, Arc<Index>)>>,
}

struct Lock(#[expect(dead_code, reason = "closing the file unlocks")] File);

impl ImageStore {
    /// Opens the store in a folder, making it if missing.
    ///
    /// # Errors
    /// The folder can't be used.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let store = Self { folder: folder.into(), cached: Mutex::new(None) };
        for part in ["layers", "uses", "scratch"] {
            let path = store.folder.join(part);
            fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        }
        store.sweep()?;
        Ok(store)
    }

    /// Removes what an import or removal left that died. Skipped while another process works.
    fn sweep(&self) -> Result<(), ImageError> {
        let path = self.folder.join("scratch");
        let in_work = self.work_lock(FlockOperation::NonBlockingLockExclusive)?;
        if in_work.is_none() {
            return Ok(());
        }
        for entry in fs::read_dir(&path).map_err(io_error("read", &path))?.flatten() {
            remove(&entry.path())?;
        }
        let index = self.index()?;
        let layers = self.layers_folder();
        for entry in fs::read_dir(&layers).map_err(io_error("read", &layers))?.flatten() {
            if !index.layers.contains_key(entry.file_name().to_string_lossy().as_ref()) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Held shared by imports, so that nobody sweeps their scratch.
    fn work_lock(&self, operation: FlockOperation) -> Result<Option<Lock>, ImageError> {
        let path = self.folder.join("work.lock");
        lock(&path, operation)
    }

    fn lock(&self, operation: FlockOperation) -> Result<Lock, ImageError> {
        let path = self.folder.join("lock");
        let busy =
            || ImageError::Io { op: "lock", path: path.clone(), source: io::ErrorKind::WouldBlock.into() };
        lock(&path, operation)?.ok_or_else(busy)
    }

    /// Imports every image for this machine from an OCI layout (folder or tar) or an archive of `docker save`;
    /// layers and archive may be compressed by gzip or zstd.
    ///
    /// # Errors
    /// The archive is broken, doesn't match its digests, or climbs out of its layers. Nothing is imported then.
    pub fn import(&self, path: &Path) -> Result<Vec<Image>, ImageError> {
        let _working = self.work_lock(FlockOperation::LockShared)?;
        let archive = Archive::open(path, &self.folder.join("scratch"))?;
        let found = archive.images()?;
        if found.is_empty() {
            return Err(ImageError::Format("no image for this platform is in it".to_owned()));
        }
        let names = found.iter().map(names_of).collect::<Result<Vec<_>, _>>()?;
        // A layer may vanish before it is in the index, if another process removes its last image meanwhile. Then all
        // is done once more, with that process kept out.
        let mut lock = None;
        loop {
            let mut sizes = BTreeMap::new();
            let mut fresh = false;
            for image in &found {
                fresh |= self.unpack_all(&archive, image, &mut sizes)?;
            }
            if fresh {
                self.settle()?;
            }
            let last = lock.is_some();
            let held = lock.map_or_else(|| self.lock(FlockOperation::LockExclusive), Ok)?;
            if let Some(index) = self.commit(&found, &names, &sizes)? {
                let ids: BTreeSet<&str> = found.iter().map(|image| image.id.as_str()).collect();
                return Ok(ids.into_iter().filter_map(|id| index.image(id)).collect());
            }
            if last {
                let source = io::ErrorKind::NotFound.into();
                return Err(ImageError::Io { op: "keep layers in", path: self.layers_folder(), source });
            }
            lock = Some(held);
        }
    }

    /// True if a layer is not in the index yet.
    fn unpack_all(
        &self,
        archive: &Archive,
        image: &Found,
        sizes: &mut BTreeMap<String, u64>,
    ) -> Result<bool, ImageError> {
        let diff_ids = &image.config.rootfs.diff_ids;
        if diff_ids.len() != image.layers.len() {
            let (ids, layers) = (diff_ids.len(), image.layers.len());
            return Err(ImageError::Format(format!(
                "it has {layers} layers, but its configuration names {ids}"
            )));
        }
        let mut fresh = false;
        for (diff_id, blob) in diff_ids.iter().zip(&image.layers) {
            let hex = reference::digest_hex(diff_id)
                .ok_or_else(|| ImageError::Format(format!("{diff_id:?} is no sha256 digest")))?;
            let known = self.index()?.layers.get(hex).copied();
            let there = self.layers_folder().join(hex).is_dir();
            let size = match known.or_else(|| sizes.get(hex).copied()) {
                Some(size) if there => size,
                _ => self.unpack(archive, blob, diff_id, hex)?,
            };
            fresh |= known.is_none() || !there;
            sizes.insert(hex.to_owned(), size);
        }
        Ok(fresh)
    }

    /// Unpacks a layer aside, verifies both digests, and moves it to its place.
    fn unpack(&self, archive: &Archive, blob: &Blob, diff_id: &str, hex: &str) -> Result<u64, ImageError> {
        let scratch = self.folder.join("scratch").join(format!("{hex}-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&scratch).map_err(io_error("make", &scratch))?;
        let result = self.unpack_into(archive, blob, diff_id, &scratch).and_then(|size| {
            let target = self.layers_folder().join(hex);
            match fs::rename(&scratch, &target) {
                // Another import was quicker: both are the same.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => {
                    remove(&scratch)?
                }
                other => other.map_err(io_error("make", &target))?,
            }
            Ok(size)
        });
        if result.is_err() {
            // The first error is the one to tell; the next sweep tries again.
            let _ = remove(&scratch);
        }
        result
    }

    fn unpack_into(
        &self,
        archive: &Archive,
        blob: &Blob,
        diff_id: &str,
        folder: &Path,
    ) -> Result<u64, ImageError> {
        let mut plain = Hashing::new(archive.layer(blob)?);
        let size = layer::unpack(&mut plain, folder)
            .map_err(|source| ImageError::Layer { diff_id: diff_id.to_owned(), source })?;
        let (raw, plain_hash) = plain.finish().map_err(io_error("read", folder))?;
        archive::verify(diff_id, &plain_hash)?;
        if let Some(digest) = &blob.digest {
            archive::verify(digest, &raw.finish().map_err(io_error("read", folder))?)?;
        }
        Ok(size)
    }

    /// Puts images into the index, under the caller's lock; `None` if a layer has vanished.
    fn commit(
        &self,
        found: &[Found],
        names: &[Names],
        sizes: &BTreeMap<String, u64>,
    ) -> Result<Option<Index>, ImageError> {
        let mut index = self.read_index()?.unwrap_or_default();
        if !sizes.keys().all(|hex| self.layers_folder().join(hex).is_dir()) {
            return Ok(None);
        }
        index.layers.extend(sizes.iter().map(|(hex, size)| (hex.clone(), *size)));
        for (image, names) in found.iter().zip(names) {
            // A tag names one image.
            for record in index.images.values_mut() {
                record.tags.retain(|tag| !names.tags.contains(tag));
            }
            let record = index.images.entry(image.id.clone()).or_default();
            record.config = image.config.clone();
            record.tags.extend(names.tags.iter().cloned());
            record.digests.extend(names.digests.iter().cloned());
        }
        self.write_index(&index)?;
        Ok(Some(index))
    }

    /// All images.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let index = self.index()?;
        Ok(index.images.keys().filter_map(|id| index.image(id)).collect())
    }

    /// The image behind a reference or id.
    ///
    /// # Errors
    /// The reference can't be parsed, or the index can't be read.
    pub fn find(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let index = self.index()?;
        Ok(index.find(reference)?.and_then(|id| index.image(id)))
    }

    /// Removes a reference, and the image with its last one; by id, the image.
    ///
    /// # Errors
    /// There is no such image, or containers use it.
    pub fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let trash = {
            let _lock = self.lock(FlockOperation::LockExclusive)?;
            let mut index = self.read_index()?.unwrap_or_default();
            let id =
                index.find(reference)?.ok_or_else(|| ImageError::NotFound(reference.to_owned()))?.to_owned();
            if index.untag(&id, reference) {
                return self.write_index(&index);
            }
            if let Some(container) = self.user_of(&id)? {
                return Err(ImageError::InUse { image: reference.to_owned(), container });
            }
            index.images.remove(&id);
            let unused = index.drop_unused_layers();
            self.write_index(&index)?;
            unused.iter().map(|hex| self.discard(hex)).collect::<Result<Vec<_>, _>>()?
        };
        trash.iter().try_for_each(|path| remove(path))
    }

    /// Moves a layer out of the way while the lock is held; deleting it takes longer.
    fn discard(&self, hex: &str) -> Result<PathBuf, ImageError> {
        let (from, to) = (
            self.layers_folder().join(hex),
            self.folder.join("scratch").join(uuid::Uuid::new_v4().to_string()),
        );
        match fs::rename(&from, &to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &from)(error)),
            _ => Ok(to),
        }
    }

    fn user_of(&self, id: &str) -> Result<Option<String>, ImageError> {
        let uses = self.folder.join("uses");
        for entry in fs::read_dir(&uses).map_err(io_error("read", &uses))?.flatten() {
            if fs::read_to_string(entry.path()).is_ok_and(|used| used == id) {
                return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
            }
        }
        Ok(None)
    }

    /// Takes an image into use for a container, so that nobody removes it.
    pub(crate) fn acquire(&self, reference: &str, container: &str) -> Result<Resolved, ImageError> {
        let _lock = self.lock(FlockOperation::LockShared)?;
        let index = self.index()?;
        let id = index.find(reference)?.ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let record = index.images.get(id).ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let path = self.folder.join("uses").join(container);
        fs::write(&path, id).map_err(io_error("write", &path))?;
        let diff_ids = record.config.rootfs.diff_ids.iter().rev();
        let layers = diff_ids.filter_map(|id| reference::digest_hex(id)).map(str::to_owned).collect();
        Ok(Resolved { id: id.to_owned(), defaults: record.config.config.clone().unwrap_or_default(), layers })
    }

    /// Ends a container's use of its image.
    pub(crate) fn release(&self, container: &str) -> Result<(), ImageError> {
        let path = self.folder.join("uses").join(container);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Containers that hold an image.
    pub(crate) fn uses(&self) -> Result<Vec<String>, ImageError> {
        let path = self.folder.join("uses");
        let entries = fs::read_dir(&path).map_err(io_error("read", &path))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    pub(crate) fn layers_folder(&self) -> PathBuf {
        self.folder.join("layers")
    }

    fn index(&self) -> Result<Arc<Index>, ImageError> {
        let path = self.folder.join("index.json");
        let version = match fs::metadata(&path) {
            Ok(meta) => (meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Arc::default()),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        let mut cached = self.cached.lock();
        if let Some((known, index)) = cached.as_ref()
            && *known == version
        {
            return Ok(index.clone());
        }
        let index = Arc::new(self.read_index()?.unwrap_or_default());
        *cached = Some((version, index.clone()));
        Ok(index)
    }

    fn read_index(&self) -> Result<Option<Index>, ImageError> {
        let path = self.folder.join("index.json");
        match fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map(Some).map_err(|error| io_error("read", &path)(error.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    /// Layers are durable before the index names them. This waits for all that the disk has to write, so it is done
    /// before the lock is taken: starts of containers need that lock.
    fn settle(&self) -> Result<(), ImageError> {
        let layers = self.layers_folder();
        let folder = File::open(&layers).map_err(io_error("open", &layers))?;
        rustix::fs::syncfs(&folder).map_err(|error| io_error("sync", &layers)(error.into()))
    }

    fn write_index(&self, index: &Index) -> Result<(), ImageError> {
        let (path, aside) = (self.folder.join("index.json"), self.folder.join("index.json.new"));
        let text = serde_json::to_vec(index).map_err(|error| io_error("write", &aside)(error.into()))?;
        fs::write(&aside, text).map_err(io_error("write", &aside))?;
        File::open(&aside).and_then(|file| file.sync_all()).map_err(io_error("sync", &aside))?;
        fs::rename(&aside, &path).map_err(io_error("write", &path))
    }
}

fn lock(path: &Path, operation: FlockOperation) -> Result<Option<Lock>, ImageError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io_error("open", path))?;
    match flock(&file, operation) {
        Ok(()) => Ok(Some(Lock(file))),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(io_error("lock", path)(error.into())),
    }
}

fn remove(path: &Path) -> Result<(), ImageError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

fn io_error(op: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_path_buf();
    move |source| ImageError::Io { op, path: path.clone(), source }
}

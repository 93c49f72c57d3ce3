//! Unpacks one layer into a folder that overlayfs can stack: whiteouts become devices and attributes, nothing leaves
//! the folder.
//!
//! Parents are opened with `openat2(RESOLVE_IN_ROOT)`: a link in the layer leads to where it would lead in a container.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fchmod, fchown, fsetxattr, linkat, makedev, mkdirat, mknodat, openat2, readlinkat, statat,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use tar::{Entry, EntryType};

/// Prefix of a file that says "the file of this name is gone".
const WHITEOUT: &[u8] = b".wh.";
/// Says "what lower layers have in this folder is gone".
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other bookkeeping of AUFS.
const AUFS: &[u8] = b".wh..wh.";
const PAX_XATTR: &str = "SCHILY.xattr.";
const DEFAULT_FOLDER_MODE: u32 = 0o755;
/// As the kernel's limit on one path.
const MAX_LINKS: usize = 40;

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// An entry names a path outside of the layer.
    #[error("entry {0:?} leaves the layer")]
    Escape(PathBuf),
    /// An entry is of a kind that no layer may hold.
    #[error("entry {0:?} is of an unknown kind")]
    Kind(PathBuf),
    /// The archive is broken.
    #[error("cannot read the layer's archive")]
    Read(#[source] io::Error),
    /// The file system refused.
    #[error("cannot unpack {path:?}")]
    Write {
        /// Entry.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Unpacks an uncompressed layer; returns the bytes of its files.
///
/// # Errors
/// See [`LayerError`]. What was unpacked so far stays.
pub(super) fn unpack(archive: impl Read, folder: &Path) -> Result<u64, LayerError> {
    let root =
        open_root(folder).map_err(|source| LayerError::Write { path: folder.to_path_buf(), source })?;
    let mut layer = Layer { root, bytes: 0, folder_times: Vec::new() };
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().map_err(LayerError::Read)? {
        layer.add(entry.map_err(LayerError::Read)?)?;
    }
    layer.finish()?;
    Ok(layer.bytes)
}

fn open_root(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(folder, flags, Mode::empty())?)
}

struct Layer {
    root: OwnedFd,
    bytes: u64,
    /// Set at the end, because unpacking into a folder changes its time.
    folder_times: Vec<(PathBuf, Timestamps)>,
}

impl Layer {
    fn add<R: Read>(&mut self, mut entry: Entry<'_, R>) -> Result<(), LayerError> {
        let named = entry.path().map_err(LayerError::Read)?.into_owned();
        let path = inside(&named).ok_or_else(|| LayerError::Escape(named.clone()))?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        let fail = |source: Errno| LayerError::Write { path: named.clone(), source: source.into() };
        let Some(name) = path.file_name().map(OsStr::to_os_string) else {
            // The layer's root itself.
            let root =
                self.root.try_clone().map_err(|source| LayerError::Write { path: named.clone(), source })?;
            return self.attributes(&mut entry, &root, &path).map_err(fail);
        };
        let parent = self.parent(&path).map_err(fail)?;
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return whiteout(&parent, name.as_bytes(), hidden).map_err(fail);
        }
        if !kind.is_dir() {
            self.clear(&parent, &name).map_err(fail)?;
        }
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "tar's kinds are open: what is unknown is refused"
        )]
        match kind {
            EntryType::Directory => self.folder(&mut entry, &parent, &name, &path).map_err(fail),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(&mut entry, &parent, &name, &path, &named)
            }
            EntryType::Link => self.hard_link(&entry, &parent, &name, &named),
            EntryType::Symlink => symlink(&entry, &parent, &name).map_err(fail),
            EntryType::Char => node(&entry, &parent, &name, FileType::CharacterDevice).map_err(fail),
            EntryType::Block => node(&entry, &parent, &name, FileType::BlockDevice).map_err(fail),
            EntryType::Fifo => node(&entry, &parent, &name, FileType::Fifo).map_err(fail),
            _ => Err(LayerError::Kind(named)),
        }
    }

    /// Opens the folder that holds `path`, making what is missing.
    fn parent(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.make(path.parent().unwrap_or(Path::new("")), MAX_LINKS)
    }

    fn make(&self, folder: &Path, links: usize) -> Result<OwnedFd, Errno> {
        match (self.open(folder), folder.file_name()) {
            (Err(Errno::NOENT), Some(name)) if links > 0 => {
                let parent = folder.parent().unwrap_or(Path::new(""));
                let above = self.make(parent, links)?;
                match mkdirat(&above, name, Mode::from_raw_mode(DEFAULT_FOLDER_MODE)) {
                    Ok(()) => self.open(folder),
                    // A link to a folder that only a lower layer has.
                    Err(Errno::EXIST) => {
                        let target = readlinkat(&above, name, Vec::new())?;
                        let target = parent.join(OsStr::from_bytes(target.to_bytes()));
                        self.make(&clamped(&target), links - 1)
                    }
                    Err(error) => Err(error),
                }
            }
            (result, _) => result,
        }
    }

    fn open(&self, folder: &Path) -> Result<OwnedFd, Errno> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, folder, flags, Mode::empty(), resolve)
    }

    /// A later entry replaces an earlier one of the same name.
    fn clear(&self, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
        match unlinkat(parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => unlinkat(parent, name, AtFlags::REMOVEDIR),
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn folder<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
    ) -> Result<(), Errno> {
        match mkdirat(parent, name, Mode::from_raw_mode(DEFAULT_FOLDER_MODE)) {
            Err(Errno::EXIST) => {
                let there = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(there.st_mode) != FileType::Directory {
                    unlinkat(parent, name, AtFlags::empty())?;
                    mkdirat(parent, name, Mode::from_raw_mode(DEFAULT_FOLDER_MODE))?;
                }
            }
            other => other?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        self.attributes(entry, &folder, path)
    }

    /// Owner, mode and extended attributes of an open file or folder, in an order that keeps set-id bits and file
    /// capabilities.
    fn attributes<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        file: &OwnedFd,
        path: &Path,
    ) -> Result<(), Errno> {
        let header = Header::of(entry)?;
        fchown(file, Some(header.uid), Some(header.gid))?;
        fchmod(file, header.mode)?;
        for (name, value) in xattrs(entry) {
            match fsetxattr(file, name.as_str(), &value, XattrFlags::empty()) {
                // A file system without them still serves most images.
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        if entry.header().entry_type().is_dir() {
            self.folder_times.push((path.to_path_buf(), header.times));
        } else {
            rustix::fs::futimens(file, &header.times)?;
        }
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
        named: &Path,
    ) -> Result<(), LayerError> {
        let fail = |source: io::Error| LayerError::Write { path: named.to_path_buf(), source };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| fail(e.into()))?;
        let mut file = std::fs::File::from(fd);
        let copied =
            io::copy(entry, &mut file).and_then(|bytes| file.flush().map(|()| bytes)).map_err(fail)?;
        self.bytes += copied;
        self.attributes(entry, &OwnedFd::from(file), path).map_err(|e| fail(e.into()))
    }

    fn hard_link<R: Read>(
        &self,
        entry: &Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        named: &Path,
    ) -> Result<(), LayerError> {
        let target = entry.link_name().map_err(LayerError::Read)?.unwrap_or_default().into_owned();
        let fail = |source: Errno| LayerError::Write { path: named.to_path_buf(), source: source.into() };
        let escape = || LayerError::Escape(named.to_path_buf());
        let inner = inside(&target).ok_or_else(escape)?;
        let file = inner.file_name().ok_or_else(escape)?;
        let from = self.open(inner.parent().unwrap_or(Path::new(""))).map_err(fail)?;
        linkat(&from, file, parent, name, AtFlags::empty()).map_err(fail)
    }

    fn finish(&self) -> Result<(), LayerError> {
        for (path, times) in &self.folder_times {
            let fail = |source: Errno| LayerError::Write { path: path.clone(), source: source.into() };
            // A later entry may have put something else in its place.
            match self.open(path) {
                Ok(folder) => rustix::fs::futimens(&folder, times).map_err(fail)?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(())
    }
}

struct Header {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    times: Timestamps,
}

impl Header {
    fn of<R: Read>(entry: &Entry<'_, R>) -> Result<Self, Errno> {
        let header = entry.header();
        let id = |value: io::Result<u64>| {
            value.ok().and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX)
        };
        let time = i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0);
        let time = Timespec { tv_sec: time, tv_nsec: 0 };
        Ok(Self {
            uid: Uid::from_raw(id(header.uid()).ok_or(Errno::INVAL)?),
            gid: Gid::from_raw(id(header.gid()).ok_or(Errno::INVAL)?),
            mode: Mode::from_raw_mode(header.mode().unwrap_or(0o644) & 0o7777),
            times: Timestamps { last_access: time, last_modification: time },
        })
    }
}

fn xattrs<R: Read>(entry: &mut Entry<'_, R>) -> Vec<(String, Vec<u8>)> {
    let Ok(Some(extensions)) = entry.pax_extensions() else { return Vec::new() };
    extensions
        .flatten()
        .filter_map(|extension| {
            let name = extension.key().ok()?.strip_prefix(PAX_XATTR)?.to_owned();
            // An image must not speak to overlayfs in its own language.
            let own = name.starts_with("trusted.overlay.") || name.starts_with("user.overlay.");
            (!own).then(|| (name, extension.value_bytes().to_vec()))
        })
        .collect()
}

/// The path below the layer's root; `None` if it climbs out.
fn inside(path: &Path) -> Option<PathBuf> {
    let mut inner = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => inner.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(inner)
}

/// The path as a process whose root is the layer would walk it, were no further links on the way.
fn clamped(path: &Path) -> PathBuf {
    let mut inner = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => inner.push(part),
            Component::ParentDir => {
                inner.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    inner
}

fn whiteout(parent: &OwnedFd, name: &[u8], hidden: &[u8]) -> Result<(), Errno> {
    if name == OPAQUE {
        return fsetxattr(parent, "trusted.overlay.opaque", b"y", XattrFlags::empty());
    }
    if name.starts_with(AUFS) {
        return Ok(());
    }
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(Errno::INVAL);
    }
    match mknodat(parent, OsStr::from_bytes(hidden), FileType::CharacterDevice, Mode::empty(), makedev(0, 0))
    {
        // The layer itself has a file of this name.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn symlink<R: Read>(entry: &Entry<'_, R>, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let header = Header::of(entry)?;
    let target = entry.link_name_bytes().ok_or(Errno::INVAL)?;
    symlinkat(OsStr::from_bytes(&target), parent, name)?;
    chownat(parent, name, Some(header.uid), Some(header.gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &header.times, AtFlags::SYMLINK_NOFOLLOW)
}

fn node<R: Read>(entry: &Entry<'_, R>, parent: &OwnedFd, name: &OsStr, kind: FileType) -> Result<(), Errno> {
    let header = Header::of(entry)?;
    let number = |value: io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
    let device = makedev(number(entry.header().device_major()), number(entry.header().device_minor()));
    mknodat(parent, name, kind, header.mode, device)?;
    chownat(parent, name, Some(header.uid), Some(header.gid), AtFlags::SYMLINK_NOFOLLOW)?;
    chmodat(parent, name, header.mode, AtFlags::empty())?;
    utimensat(parent, name, &header.times, AtFlags::SYMLINK_NOFOLLOW)
}

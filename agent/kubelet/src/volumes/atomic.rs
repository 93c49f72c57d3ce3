//! Writes a set of files so that a reader sees the old set or the new one, never a mixture: the layout of upstream's
//! atomic writer (`..data` → `..<time>/`, visible names → `..data/<name>`).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
    /// Owner, if not root.
    pub(crate) owner: Option<u32>,
}

/// Files by path below the volume.
pub(crate) type Files = BTreeMap<String, File>;

/// The set could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("invalid path: {0:?} must be relative and must not contain '..'")]
    Path(String),
    #[error("cannot {op} {path:?}")]
    Io {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { op, path, source }
}

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// A path that stays below the volume and does not look like one of ours.
fn check(path: &str) -> Result<(), Error> {
    let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if path.is_empty() || path.len() > 4096 || path.starts_with("..") || !plain {
        return Err(Error::Path(path.to_owned()));
    }
    Ok(())
}

/// Makes `dir` hold exactly `files`. Nothing is touched if it does already.
pub(crate) fn write(dir: &Path, files: &Files, group: Option<u32>) -> Result<(), Error> {
    files.keys().try_for_each(|path| check(path))?;
    fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(if group.is_some() { 0o2777 } else { 0o777 }))
        .map_err(io_error("set the mode of", dir))?;
    if let Some(group) = group {
        std::os::unix::fs::lchown(dir, None, Some(group)).map_err(io_error("change the group of", dir))?;
    }
    let data = dir.join(DATA);
    let old = fs::read_link(&data).ok();
    if old.as_ref().is_some_and(|old| same(&dir.join(old), files, group)) {
        return Ok(());
    }
    let fresh = fresh_name(dir);
    let target = dir.join(&fresh);
    write_all(&target, files, group)?;
    let link = dir.join(DATA_NEW);
    // Left over from a crash, if there.
    let _ = fs::remove_file(&link);
    symlink(&fresh, &link).map_err(io_error("create", &link))?;
    fs::rename(&link, &data).map_err(io_error("replace", &data))?;
    show(dir, files)?;
    if let Some(old) = old {
        let old = dir.join(old);
        fs::remove_dir_all(&old).map_err(io_error("remove", &old))?;
    }
    Ok(())
}

fn fresh_name(dir: &Path) -> OsString {
    let now = crate::clock::now();
    let stamp = now.strftime("..%Y_%m_%d_%H_%M_%S").to_string();
    let mut number = now.subsec_nanosecond();
    loop {
        let name = OsString::from(format!("{stamp}.{number}"));
        if !dir.join(&name).exists() {
            return name;
        }
        number += 1;
    }
}

fn group_mode(mode: u32, group: Option<u32>) -> u32 {
    // With an fsGroup the group may read what the owner may (upstream's ownership change does the same).
    if group.is_some() { mode | 0o440 } else { mode }
}

fn write_all(target: &Path, files: &Files, group: Option<u32>) -> Result<(), Error> {
    let make_dir = |path: &Path| -> Result<(), Error> {
        fs::create_dir_all(path).map_err(io_error("create", path))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))
            .map_err(io_error("set the mode of", path))
    };
    make_dir(target)?;
    for (name, file) in files {
        let path = target.join(name);
        if let Some(parent) = path.parent().filter(|p| *p != target) {
            make_dir(parent)?;
        }
        fs::write(&path, &file.data).map_err(io_error("write", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(group_mode(file.mode, group)))
            .map_err(io_error("set the mode of", &path))?;
        if file.owner.is_some() || group.is_some() {
            std::os::unix::fs::lchown(&path, file.owner, group)
                .map_err(io_error("change the owner of", &path))?;
        }
    }
    Ok(())
}

/// Links the first component of each path, and takes away links to what is gone.
fn show(dir: &Path, files: &Files) -> Result<(), Error> {
    let wanted: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &wanted {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link).map_err(io_error("create", &link))?;
        }
    }
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let entry = entry.map_err(io_error("read", dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with("..") || wanted.contains(name) {
            continue;
        }
        let is_ours = fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(DATA));
        if is_ours {
            fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Whether the set in `dir` is `files` already, modes and owners included.
fn same(dir: &Path, files: &Files, group: Option<u32>) -> bool {
    use std::os::unix::fs::MetadataExt;
    let right = |(name, file): (&String, &File)| {
        let path = dir.join(name);
        fs::metadata(&path).is_ok_and(|m| {
            m.mode() & 0o7777 == group_mode(file.mode, group)
                && group.is_none_or(|g| m.gid() == g)
                && file.owner.is_none_or(|o| m.uid() == o)
        }) && fs::read(&path).is_ok_and(|data| data == file.data)
    };
    files.iter().all(right) && count(dir) == Some(files.len())
}

fn count(dir: &Path) -> Option<usize> {
    let mut number = 0;
    for entry in fs::read_dir(dir).ok()? {
        let entry = entry.ok()?;
        number += if entry.file_type().ok()?.is_dir() { count(&entry.path())? } else { 1 };
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        let file = |data: &str| File { data: data.as_bytes().to_vec(), mode: 0o644, owner: None };
        list.iter().map(|(name, data)| ((*name).to_owned(), file(data))).collect()
    }

    #[test]
    fn a_new_set_replaces_the_old_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("v");
        write(&dir, &files(&[("a", "1"), ("sub/b", "2"), ("gone", "x")]), None).unwrap();
        assert_eq!(fs::read_to_string(dir.join("sub/b")).unwrap(), "2");
        let first = fs::read_link(dir.join("..data")).unwrap();
        write(&dir, &files(&[("a", "1"), ("sub/b", "2"), ("gone", "x")]), None).unwrap();
        assert_eq!(
            fs::read_link(dir.join("..data")).unwrap(),
            first,
            "an unchanged set is not written again"
        );
        write(&dir, &files(&[("a", "3"), ("c", "4")]), None).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert_eq!(fs::read_to_string(dir.join("c")).unwrap(), "4");
        assert!(
            fs::symlink_metadata(dir.join("gone")).is_err() && fs::symlink_metadata(dir.join("sub")).is_err()
        );
        assert!(!dir.join(first).exists());
        let mode = fs::metadata(dir.join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o644);
    }

    #[test]
    fn paths_that_climb_out_are_refused_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["../x", "/etc/x", "a/../../x", "..data", "", "a/./../b"] {
            assert!(matches!(write(dir.path(), &files(&[(bad, "1")]), None), Err(Error::Path(_))), "{bad}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

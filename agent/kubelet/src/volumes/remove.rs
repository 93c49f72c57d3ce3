//! Takes away what a pod leaves: mounts first, deepest first, then its folder. Never reaches into a mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// The kernel's list escapes blanks and the like as octal.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let code =
            octal.and_then(|o| std::str::from_utf8(o).ok()).and_then(|o| u8::from_str_radix(o, 8).ok());
        if let Some(code) = code {
            bytes.push(code);
            rest = &tail[3..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    use std::os::unix::ffi::OsStringExt;
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    // Later mounts cover earlier ones.
    below.reverse();
    Ok(below)
}

/// Whether something is mounted exactly there.
pub(crate) fn is_mount_point(dir: &Path) -> io::Result<bool> {
    Ok(mounts_below(dir)?.iter().any(|point| point == dir))
}

/// Removes a folder in which nothing is mounted. Succeeds on one that is gone.
pub(crate) fn folder(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Unmounts everything below `dir` and removes it. Succeeds on one that is gone.
pub(crate) fn pod_dir(dir: &Path) -> io::Result<()> {
    if fs::symlink_metadata(dir).is_err() {
        return Ok(());
    }
    let dir = dir.canonicalize()?;
    for point in mounts_below(&dir)? {
        umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    if !mounts_below(&dir)?.is_empty() {
        return Err(io::Error::other("something is still mounted below"));
    }
    fs::remove_dir_all(&dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/self")).unwrap());
    }

    #[test]
    fn removal_is_repeatable_and_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), "x").unwrap();
        let pod = dir.path().join("pod");
        fs::create_dir(&pod).unwrap();
        std::os::unix::fs::symlink(&outside, pod.join("link")).unwrap();
        pod_dir(&pod).unwrap();
        pod_dir(&pod).unwrap();
        assert!(!pod.exists() && outside.join("keep").exists());
    }
}

//! Volumes that may hold secrets never get to a disk: they lie in memory, in one file system of the node, and a link leads to each from where
//! the pod's other volumes are. (Upstream mounts a file system for each, which every pod's start and end would wait for.)

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::remove::{self, is_mount_point};

/// Makes the node's file system; one that an earlier kubelet made stays, with what its pods have there.
pub(crate) fn ensure(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let dir = dir.canonicalize()?;
    if is_mount_point(&dir)? {
        return Ok(());
    }
    let make = |options: &str| {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some(options))
    };
    // Before Linux 6.4 memory can't be kept from swap.
    match make("mode=0700,noswap") {
        Err(Errno::EINVAL) => make("mode=0700")?,
        made => made?,
    }
    Ok(())
}

/// Removes it. Succeeds on one that is gone.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    match umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => remove::folder(dir),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes the folder of a volume, and the link to it. Answers which folder the volume is: one that has always been a folder stays it,
/// as containers that run already have it mounted.
pub(crate) fn place(link: &Path, folder: PathBuf) -> io::Result<PathBuf> {
    match fs::symlink_metadata(link) {
        Ok(found) if found.is_dir() => return Ok(link.to_owned()),
        Ok(_) if fs::read_link(link)? == folder => {}
        Ok(_) => {
            fs::remove_file(link)?;
            symlink(&folder, link)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            link.parent().map_or(Ok(()), fs::create_dir_all)?;
            symlink(&folder, link)?;
        }
        Err(error) => return Err(error),
    }
    // After a reboot the link is there, and the folder isn't.
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_where_its_link_leads() {
        let dir = tempfile::tempdir().unwrap();
        let (link, folder) = (dir.path().join("pods/a/volumes/p/v"), dir.path().join("memory/a/p/v"));
        for _ in 0..2 {
            assert_eq!(place(&link, folder.clone()).unwrap(), folder);
            fs::write(link.join("token"), "t").unwrap();
            assert_eq!(fs::read_to_string(folder.join("token")).unwrap(), "t");
            // As by a reboot.
            fs::remove_dir_all(dir.path().join("memory")).unwrap();
        }
        let elsewhere = dir.path().join("other/a/p/v");
        assert_eq!(place(&link, elsewhere.clone()).unwrap(), elsewhere);
        assert_eq!(fs::read_link(&link).unwrap(), elsewhere);
    }

    #[test]
    fn a_folder_of_an_earlier_kubelet_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir(&volume).unwrap();
        assert_eq!(place(&volume, dir.path().join("memory/v")).unwrap(), volume);
        assert!(!dir.path().join("memory").exists());
    }

    #[test]
    fn what_is_gone_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("memory");
        for _ in 0..2 {
            remove(&memory).unwrap();
            fs::create_dir_all(memory.join("pod/v")).unwrap();
        }
        remove(&memory).unwrap();
        assert!(!memory.exists());
    }
}

//! Folders that have one folder for each pod or container.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// Makes such a folder, with those above it, and has ext4 spread what is made in it over the disk (`chattr +T`).
///
/// Otherwise all of it has one place, and there ext4 passes over every inode that was deleted in the last five minutes whenever it makes a new one: a node
/// whose pods come and go needs twice the time to start them. Other file systems take no such flag.
///
/// # Errors
/// If it can't be made.
pub fn make_spread(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let outcome = File::open(path).and_then(|folder| {
        let flags = ioctl_getflags(&folder)?;
        Ok(ioctl_setflags(&folder, flags | IFlags::TOPDIR)?)
    });
    if let Err(error) = outcome {
        tracing::debug!(path = %path.display(), %error, "the file system spreads no folders");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_and_made_again() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("a/b");
        for _ in 0..2 {
            make_spread(&path).unwrap();
            // Where there is such a flag, it is set.
            let flags = ioctl_getflags(File::open(&path).unwrap());
            assert!(
                flags.is_err() || !is_ext4(&path) || flags.is_ok_and(|flags| flags.contains(IFlags::TOPDIR))
            );
        }
        let file = temporary.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(make_spread(&file.join("c")).is_err());
    }

    fn is_ext4(path: &Path) -> bool {
        const EXT4: i64 = 0xef53;
        rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == EXT4)
    }
}

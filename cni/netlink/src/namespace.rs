//! Network namespaces: made, entered by a thread of their own, removed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::Error;

/// The namespace that the calling thread is in.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Opens a namespace by its file.
///
/// # Errors
/// [`crate::Class::NotFound`] if there is no such file.
pub fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| failed("open", path, source))
}

/// Runs `work` on a throw-away thread within the namespace: the caller's own thread never leaves its own.
///
/// # Errors
/// If the namespace can't be entered.
///
/// # Panics
/// If `work` does.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let namespace = open(path)?;
    let enter = move || -> Result<T, Error> {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| failed("enter", path, errno.into()))?;
        Ok(work())
    };
    std::thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Runs `work` on the calling thread within the namespace, and comes back.
///
/// For a process of one thread that can't afford another; others use [`within`].
///
/// # Errors
/// If the namespace can't be entered, or the thread can't come back; then it must not go on.
pub fn during<T>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> T) -> Result<T, Error> {
    during_from(open(Path::new(CURRENT))?.as_fd(), namespace, work)
}

/// The same for who has a descriptor of the namespace that the thread is in, as of [`crate::Netlink::namespace`].
///
/// # Errors
/// As [`during`].
pub fn during_from<T>(
    own: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T,
) -> Result<T, Error> {
    let current = Path::new(CURRENT);
    let step = |op| move |errno: nix::errno::Errno| failed(op, current, errno.into());
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(step("leave"))?;
    let outcome = work();
    setns(own, CloneFlags::CLONE_NEWNET).map_err(step("return to"))?;
    Ok(outcome)
}

/// Makes a namespace that lasts until its file is unmounted.
///
/// # Errors
/// If the file can't be made or the process may not.
pub fn create(path: &Path) -> Result<(), Error> {
    File::create(path).map_err(|source| failed("create", path, source))?;
    let make = || -> Result<(), Error> {
        let step = |errno: nix::errno::Errno| failed("create", path, errno.into());
        unshare(CloneFlags::CLONE_NEWNET).map_err(step)?;
        mount(Some(CURRENT), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(step)
    };
    std::thread::scope(|scope| match scope.spawn(make).join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Lets go of a namespace and removes its file. One that is gone is no error.
///
/// # Errors
/// If the file can't be removed.
pub fn remove(path: &Path) -> Result<(), Error> {
    // EINVAL: not a mount point, as after a reboot.
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(errno) => return Err(failed("unmount", path, errno.into())),
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, source)),
        _ => Ok(()),
    }
}

fn failed(op: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Namespace { op, path: path.to_path_buf(), source }
}

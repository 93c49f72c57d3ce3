//! A process' claim on a role: a locked file with its pid. The kernel drops the lock with the process, so it never goes stale.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Held for as long as the process has the role.
#[derive(Debug)]
pub(crate) struct Claim(
    #[expect(dead_code, reason = "the lock lives as long as the descriptor")] Flock<File>,
);

/// Takes the role, or answers the pid of the process that has it.
pub(crate) fn claim(path: &Path) -> io::Result<Result<Claim, Option<Pid>>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(Err(pid_in(path))),
        Err((_, errno)) => return Err(errno.into()),
    };
    lock.set_len(0)?;
    writeln!(lock, "{}", std::process::id())?;
    Ok(Ok(Claim(lock)))
}

/// The process that has the role now, if any.
pub(crate) fn holder(path: &Path) -> Option<Pid> {
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(_) => None,
        Err(_) => pid_in(path),
    }
}

fn pid_in(path: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some(Pid::from_raw(pid))
}

/// A handle on a process that can't come to mean another one when the pid is used again.
pub(crate) struct Process(OwnedFd);

impl Process {
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel just returned this descriptor; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        // SAFETY: the descriptor is a pidfd; a null siginfo means the same as kill(2).
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Waits until the process has ended; `false` if it is still there after `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        use std::os::fd::AsFd as _;
        let milliseconds = u16::try_from(timeout.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::from(milliseconds))? > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_has_one_holder() {
        let path = std::env::temp_dir().join(format!("weft-lock-{}", std::process::id()));
        let first = claim(&path).unwrap().unwrap();
        assert_eq!(claim(&path).unwrap().unwrap_err(), Some(Pid::this()));
        assert_eq!(holder(&path), Some(Pid::this()));
        drop(first);
        assert_eq!(holder(&path), None);
        fs::remove_file(path).unwrap();
    }
}

//! Why the kernel, or a namespace, could not be used.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a request.
    #[error("cannot {op} {subject}")]
    Refused {
        /// What was asked for.
        op: &'static str,
        /// On what.
        subject: String,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// The socket failed.
    #[error("netlink socket: cannot {op}")]
    Socket {
        /// What was being done.
        op: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer can't be read.
    #[error("netlink: cannot read the answer to {op}: {reason}")]
    Decode {
        /// What was asked for.
        op: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A dump was interrupted by changes too many times in a row.
    #[error("netlink: the dump to {op} was interrupted every time")]
    Interrupted {
        /// What was asked for.
        op: &'static str,
    },
    /// A switch of the kernel could not be used.
    #[error("cannot {op} {path:?}")]
    Sysctl {
        /// What was being done.
        op: &'static str,
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A namespace could not be used.
    #[error("cannot {op} the network namespace {path:?}")]
    Namespace {
        /// What was being done.
        op: &'static str,
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// What was named isn't there.
    NotFound,
    /// What was to be made is there already.
    Exists,
    /// May succeed if it is tried again.
    Retry,
    /// The process may not do this.
    Denied,
    /// A person must look.
    Fatal,
}

impl Error {
    /// What can be done about it.
    pub fn class(&self) -> Class {
        let errno = match self {
            Self::Refused { errno, .. } => *errno,
            Self::Socket { source, .. } | Self::Namespace { source, .. } | Self::Sysctl { source, .. } => {
                Errno::from_raw(source.raw_os_error().unwrap_or(0))
            }
            Self::Decode { .. } => return Class::Fatal,
            Self::Interrupted { .. } => return Class::Retry,
        };
        if [Errno::ENODEV, Errno::ENOENT, Errno::ESRCH, Errno::EADDRNOTAVAIL, Errno::ENXIO].contains(&errno) {
            Class::NotFound
        } else if errno == Errno::EEXIST {
            Class::Exists
        } else if [Errno::EAGAIN, Errno::EBUSY, Errno::EINTR, Errno::ENOBUFS, Errno::ENOMEM].contains(&errno)
        {
            Class::Retry
        } else if [Errno::EPERM, Errno::EACCES].contains(&errno) {
            Class::Denied
        } else {
            Class::Fatal
        }
    }
}

/// Makes "it is there already" a success.
pub(crate) fn ok_if_exists(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(error) if error.class() == Class::Exists => Ok(()),
        other => other,
    }
}

/// Makes "it is gone already" a success.
pub(crate) fn ok_if_gone(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(error) if error.class() == Class::NotFound => Ok(()),
        other => other,
    }
}

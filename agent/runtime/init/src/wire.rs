//! The protocol between the agent and a sandbox's init: messages, framing, and the way to a socket with a long path.
//!
//! A message is a little-endian `u32` length and that many bytes of JSON. File descriptors of an exec travel with the
//! first byte of its message (`SCM_RIGHTS`). One connection carries one request at a time; `Subscribe` turns a
//! connection into a stream of events.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Name of the init's socket in the sandbox's run folder.
pub const SOCKET: &str = "init.sock";
/// Name of the file with the [`Sandbox`] that an init is started from.
pub const CONFIG: &str = "config.json";
/// Largest message: arguments and environment are bound by the kernel to 2 MiB, and JSON can quote each byte as six.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Bytes of the length before a message.
pub const HEADER_BYTES: usize = 4;

/// What an init is started from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sandbox {
    /// Sandbox id.
    pub id: String,
    /// Make a UTS namespace with this host name; `None` keeps the node's.
    pub hostname: Option<String>,
    /// Make a network namespace and pin it here; `None` keeps the node's.
    pub netns: Option<PathBuf>,
    /// Make an IPC namespace, with a `/dev/shm` mounted here; `None` keeps the node's.
    pub shm: Option<PathBuf>,
    /// Sysctls to set in the new namespaces, in the form `net.ipv4.ip_forward`.
    pub sysctls: BTreeMap<String, String>,
    /// Control group folders of version 1 that the init joins.
    pub join: Vec<PathBuf>,
    /// That of version 2, which it is born in.
    pub unified: Option<PathBuf>,
}

/// A container to start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Start {
    /// Container id.
    pub id: String,
    /// What runs in it.
    pub process: Process,
    /// Its root file system.
    pub root: Root,
    /// Mounts in order.
    pub mounts: Vec<Mount>,
    /// No masks, `/sys` writable, all devices.
    pub privileged: bool,
    /// Stay in the node's PID namespace.
    pub host_pid: bool,
    /// Folder to mount on `/dev/shm`.
    pub shm: PathBuf,
    /// Its control groups.
    pub cgroups: Cgroups,
    /// Log file; its folder is made if missing.
    pub log: PathBuf,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
    /// Folder for `run.json` and `exit.json`.
    pub state: PathBuf,
    /// OOM score adjustment.
    pub oom_score_adj: i32,
}

/// An overlay of layers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Root {
    /// Folder that holds the layers.
    pub layers: PathBuf,
    /// Names of the layers in it, the topmost first.
    pub lower: Vec<String>,
    /// Folder with `upper`, `work` and the mount point `root`.
    pub folder: PathBuf,
    /// Remount the root read-only at the end.
    pub read_only: bool,
}

/// A bind mount.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Path on the node.
    pub source: PathBuf,
    /// Path in the container.
    pub target: PathBuf,
    /// Read-only, with all mounts below it.
    pub read_only: bool,
    /// Device nodes below it work.
    pub devices: bool,
    /// Propagation.
    pub propagation: Propagation,
}

/// Mount propagation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// `rprivate`.
    #[default]
    Private,
    /// `rslave`.
    Slave,
    /// `rshared`.
    Shared,
}

/// The control groups of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cgroups {
    /// Folders of version 1 to join.
    pub join: Vec<PathBuf>,
    /// Folder of the cgroup2 tree, joined at clone.
    pub unified: Option<PathBuf>,
    /// What the container sees below `/sys/fs/cgroup`: name (empty for the folder itself) and folder.
    pub view: Vec<(String, PathBuf)>,
    /// File with a line `oom_kill <n>`.
    pub oom: Option<PathBuf>,
}

/// What runs, as whom.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working folder; made if missing.
    pub cwd: PathBuf,
    /// User.
    pub user: User,
    /// Capabilities by bit.
    pub capabilities: u64,
    /// Set no_new_privs.
    pub no_new_privs: bool,
    /// File with a seccomp filter: 8 bytes an instruction, in the kernel's layout. Several are applied in order.
    pub seccomp: Vec<PathBuf>,
}

/// A user as the image and the pod name it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct User {
    /// The image's `user[:group]`, by name or number; empty for root.
    pub image: String,
    /// User id over the image's.
    pub uid: Option<u32>,
    /// Group id over the image's.
    pub gid: Option<u32>,
    /// More groups.
    pub supplemental: Vec<u32>,
    /// Refuse user id 0.
    pub non_root: bool,
}

/// A command to run in a container. Its file descriptors follow in this order: stdin, stdout, stderr, tty.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Container id.
    pub container: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// A descriptor for standard input is sent.
    pub stdin: bool,
    /// A descriptor for standard output is sent.
    pub stdout: bool,
    /// A descriptor for standard error is sent.
    pub stderr: bool,
    /// A descriptor of a terminal is sent.
    pub tty: bool,
}

impl Exec {
    /// How many descriptors belong to it.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        [self.stdin, self.stdout, self.stderr, self.tty].into_iter().filter(|sent| *sent).count()
    }
}

/// A request to the init.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start a container; answered by `Started` or `Failed`.
    Start(Box<Start>),
    /// Signal a container's first process; answered by `Done` or `Failed`.
    Signal {
        /// Container id.
        container: String,
        /// Signal number.
        signal: i32,
    },
    /// Run a command; answered by `Exited` when it ends. It is killed if the connection closes before.
    Exec(Exec),
    /// Answered by `Containers`, then by an `Event` whenever there is one.
    Subscribe,
    /// Forget a container that has ended; answered by `Done`.
    Forget {
        /// Container id.
        container: String,
    },
    /// Kill all and end; answered by `Done` after the last container has ended.
    Shutdown,
}

/// An answer of the init.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// The container runs.
    Started {
        /// Its first process, as the node numbers it.
        pid: i32,
        /// Nanoseconds since the epoch.
        started_at_ns: i64,
    },
    /// It could not be done.
    Failed {
        /// Why, in upstream's words where it has some.
        message: String,
    },
    /// The command ended.
    Exited {
        /// Exit code; 128 + signal if killed.
        code: i32,
    },
    /// All containers known to the init.
    Containers(Vec<Status>),
    /// A container ended.
    Event(Status),
}

/// A container as its init knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Container id.
    pub id: String,
    /// Its first process while it runs.
    pub pid: i32,
    /// Nanoseconds since the epoch.
    pub started_at_ns: i64,
    /// Set once it has ended.
    pub exit: Option<Exit>,
}

/// Name of the file with an [`Exit`] in a container's folder.
pub const EXIT_FILE: &str = "exit.json";
/// Name of the file with a [`Run`] in a container's folder.
pub const RUN_FILE: &str = "run.json";

/// Written when a container has been started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its first process.
    pub pid: i32,
    /// Nanoseconds since the epoch.
    pub started_at_ns: i64,
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 + signal if killed.
    pub code: i32,
    /// Nanoseconds since the epoch; zero if it never ran.
    pub started_at_ns: i64,
    /// Nanoseconds since the epoch.
    pub finished_at_ns: i64,
    /// The kernel killed in it for lack of memory.
    pub oom_killed: bool,
    /// Why it could not be started.
    pub message: String,
}

/// A message with its length before it.
///
/// # Errors
/// The message is larger than [`MAX_MESSAGE_BYTES`] or can't be said in JSON.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut bytes, message)?;
    let body = bytes.len() - HEADER_BYTES;
    let length = u32::try_from(body).ok().filter(|_| body <= MAX_MESSAGE_BYTES).ok_or_else(too_large)?;
    bytes[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Takes the first whole message off a buffer; `None` while it is incomplete.
///
/// # Errors
/// The length is over [`MAX_MESSAGE_BYTES`], or the message isn't what was expected.
pub fn decode<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let body = u32::from_le_bytes(*header) as usize;
    if body > MAX_MESSAGE_BYTES {
        return Err(too_large());
    }
    let Some(bytes) = buffer.get(HEADER_BYTES..HEADER_BYTES + body) else { return Ok(None) };
    let message = serde_json::from_slice(bytes)?;
    buffer.drain(..HEADER_BYTES + body);
    Ok(Some(message))
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "message too large")
}

/// A path to the socket in an open folder that fits a socket address whatever the folder's own path is.
/// Valid as long as `folder` is open.
#[must_use]
pub fn socket_path(folder: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(SOCKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_where_they_end() {
        let first = encode(&Reply::Exited { code: 3 }).unwrap();
        let mut buffer = first.clone();
        buffer.extend(encode(&Reply::Done).unwrap());
        let mut part = first[..first.len() - 1].to_vec();
        assert_eq!(decode::<Reply>(&mut part).unwrap(), None);
        assert_eq!(decode::<Reply>(&mut buffer).unwrap(), Some(Reply::Exited { code: 3 }));
        assert_eq!(decode::<Reply>(&mut buffer).unwrap(), Some(Reply::Done));
        assert_eq!(decode::<Reply>(&mut buffer).unwrap(), None);
    }

    #[test]
    fn a_huge_length_is_refused_before_it_is_read() {
        assert!(decode::<Reply>(&mut vec![0xff; 8]).is_err());
        assert!(decode::<Reply>(&mut b"\x02\0\0\0{]".to_vec()).is_err());
    }
}

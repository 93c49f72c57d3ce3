//! Starts a process: the clone, and how the child reports what failed before exec.
//!
//! Parent and child share a socket pair. The child sends `T` with a terminal's master, or `E` and a message; it is
//! closed by a successful exec.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2, setsid};
use weft_agent_runtime_init::cgroup;
use weft_agent_runtime_init::wire::{Exec, Start};

use crate::log::Stream;
use crate::process::{self, Filters, Streams};
use crate::rootfs::{self, Context};
use crate::sys::{self, Fork};

/// Longest message of a child.
const MAX_REPORT_BYTES: usize = 4096;

/// A process that has become its program.
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// Read ends of its output.
    pub(crate) output: Vec<(Stream, OwnedFd)>,
    /// Keeps its standard input open.
    pub(crate) stdin: Option<OwnedFd>,
}

/// Our ends and the child's ends of a container's streams.
#[derive(Default)]
struct Plumbing {
    child: Streams,
    output: Vec<(Stream, OwnedFd)>,
    stdin: Option<OwnedFd>,
}

impl Plumbing {
    fn new(spec: &Start) -> Result<Self, String> {
        if spec.tty {
            return Ok(Self::default());
        }
        let pipe = || pipe2(OFlag::O_CLOEXEC).context(|| "make a pipe".to_owned());
        let ((out, child_out), (err, child_err)) = (pipe()?, pipe()?);
        let mut plumbing = Self {
            child: Streams { stdout: Some(child_out), stderr: Some(child_err), ..Streams::default() },
            output: vec![(Stream::Stdout, out), (Stream::Stderr, err)],
            stdin: None,
        };
        if spec.stdin {
            let (child_in, stdin) = pipe()?;
            plumbing.child.stdin = Some(child_in);
            plumbing.stdin = Some(stdin);
        }
        Ok(plumbing)
    }
}

/// Starts a container. On failure nothing of it is left.
pub(crate) fn start(spec: &Start) -> Result<Launched, String> {
    let filters = Filters::read(&spec.process)?;
    let mut plumbing = Plumbing::new(spec)?;
    let (ours, theirs) = status_pair()?;
    let mut namespaces = libc::CLONE_NEWNS;
    if !spec.host_pid {
        namespaces |= libc::CLONE_NEWPID;
    }
    match clone(namespaces, spec.cgroups.unified.as_deref())? {
        Fork::Child => {
            drop(ours);
            let Err(message) = container(spec, &mut plumbing.child, &filters, &theirs);
            report(&theirs, &message)
        }
        Fork::Parent { pid, pidfd } => {
            drop(theirs);
            plumbing.child = Streams::default();
            if let Some(master) = finish(pid, &ours)? {
                plumbing.stdin = master.try_clone().ok().filter(|_| spec.stdin);
                plumbing.output.push((Stream::Stdout, master));
            }
            Ok(Launched { pid, pidfd, output: plumbing.output, stdin: plumbing.stdin })
        }
    }
}

/// Starts a command in a running container.
pub(crate) fn exec(
    spec: &Start,
    leader: BorrowedFd<'_>,
    request: &Exec,
    streams: Streams,
) -> Result<Launched, String> {
    let filters = Filters::read(&spec.process)?;
    let (ours, theirs) = status_pair()?;
    match clone_within(spec, leader)? {
        Fork::Child => {
            drop(ours);
            let Err(message) = command(spec, leader, request, &streams, &filters);
            report(&theirs, &message)
        }
        Fork::Parent { pid, pidfd } => {
            drop((theirs, streams));
            finish(pid, &ours)?;
            Ok(Launched { pid, pidfd, output: Vec::new(), stdin: None })
        }
    }
}

fn status_pair() -> Result<(OwnedFd, OwnedFd), String> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .context(|| "make a socket pair".to_owned())
}

/// Clones into new namespaces and the group of version 2.
pub(crate) fn clone(namespaces: i32, unified: Option<&Path>) -> Result<Fork, String> {
    let unified = unified.map(File::open).transpose().context(|| "open the cgroup".to_owned())?;
    sys::clone3(namespaces, unified.as_ref().map(AsFd::as_fd)).context(|| "clone".to_owned())
}

/// Clones into a container's PID namespace: a child is born where its parent's `setns` pointed, and the parent may
/// always come back to its own namespace.
fn clone_within(spec: &Start, leader: BorrowedFd<'_>) -> Result<Fork, String> {
    if spec.host_pid {
        return clone(0, spec.cgroups.unified.as_deref());
    }
    let own = File::open("/proc/self/ns/pid").context(|| "open our PID namespace".to_owned())?;
    setns(leader, CloneFlags::CLONE_NEWPID).context(|| "enter the container".to_owned())?;
    let forked = clone(0, spec.cgroups.unified.as_deref());
    if !matches!(forked, Ok(Fork::Child)) {
        setns(own, CloneFlags::CLONE_NEWPID).context(|| "leave the container".to_owned())?;
    }
    forked
}

/// The parent's part: the child's word.
fn finish(pid: i32, status: &OwnedFd) -> Result<Option<OwnedFd>, String> {
    let outcome = listen(status);
    if outcome.is_err() {
        let _ = waitpid(Pid::from_raw(pid), None);
    }
    outcome
}

fn listen(status: &OwnedFd) -> Result<Option<OwnedFd>, String> {
    let mut master = None;
    loop {
        let mut bytes = [0; MAX_REPORT_BYTES];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(status.as_raw_fd(), &mut slices, Some(&mut space), flags)
            .context(|| "hear from the container's process".to_owned())?;
        let descriptors = received(&message);
        let length = message.bytes;
        match bytes[..length].split_first() {
            None => return Ok(master),
            Some((b'T', _)) => master = descriptors.into_iter().next(),
            Some((_, text)) => return Err(String::from_utf8_lossy(text).into_owned()),
        }
    }
}

/// Takes the descriptors out of a message.
pub(crate) fn received<S>(message: &nix::sys::socket::RecvMsg<'_, '_, S>) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    for control in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            found.extend(descriptors.into_iter().map(sys::own_received));
        }
    }
    found
}

fn report(status: &OwnedFd, message: &str) -> ! {
    let mut bytes = format!("E{message}").into_bytes();
    bytes.truncate(MAX_REPORT_BYTES);
    // If the parent is gone there is nobody to tell.
    let _ = nix::sys::socket::send(status.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL);
    sys::exit_now(127)
}

fn container(
    spec: &Start,
    streams: &mut Streams,
    filters: &Filters,
    status: &OwnedFd,
) -> Result<Infallible, String> {
    setsid().context(|| "start a session".to_owned())?;
    join(&spec.cgroups.join);
    // Lowering it takes a right that a node may not give.
    let _ = fs::write("/proc/self/oom_score_adj", spec.oom_score_adj.to_string());
    rootfs::enter(spec)?;
    if spec.tty {
        streams.tty = Some(terminal(status)?);
    }
    rootfs::working_folder(&spec.process.cwd)?;
    rootfs::seal(spec)?;
    unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "make a cgroup namespace".to_owned())?;
    process::become_program(&spec.process, &spec.process.argv, streams, filters)
}

fn command(
    spec: &Start,
    leader: BorrowedFd<'_>,
    request: &Exec,
    streams: &Streams,
    filters: &Filters,
) -> Result<Infallible, String> {
    setsid().context(|| "start a session".to_owned())?;
    join(&spec.cgroups.join);
    let _ = fs::write("/proc/self/oom_score_adj", spec.oom_score_adj.to_string());
    setns(leader, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
        .context(|| "enter the container".to_owned())?;
    process::become_program(&spec.process, &request.argv, streams, filters)
}

/// A refused hierarchy costs its limits only; the agent has warned when it made the group.
pub(crate) fn join(groups: &[PathBuf]) {
    for refused in cgroup::join(groups) {
        eprintln!("{refused}: {}", refused.source);
    }
}

/// A terminal of the container's own devpts, also its /dev/console; the master goes to the init.
fn terminal(status: &OwnedFd) -> Result<OwnedFd, String> {
    let master = File::options()
        .read(true)
        .write(true)
        .open("/dev/pts/ptmx")
        .context(|| "open a terminal".to_owned())?;
    let peer = sys::open_peer(master.as_fd()).context(|| "open the terminal's other side".to_owned())?;
    File::create("/dev/console").context(|| "make /dev/console".to_owned())?;
    // The first terminal of a new devpts is number 0.
    let none: Option<&str> = None;
    nix::mount::mount(Some("/dev/pts/0"), "/dev/console", none, nix::mount::MsFlags::MS_BIND, none)
        .context(|| "mount /dev/console".to_owned())?;
    let descriptors = [master.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(status.as_raw_fd(), &[IoSlice::new(b"T")], &control, MsgFlags::MSG_NOSIGNAL, None)
        .context(|| "hand the terminal over".to_owned())?;
    Ok(peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a report the other end was closed by exec, or by an end that is noticed as any process' is.
    #[test]
    fn a_report_is_heard() {
        for (report, heard) in [(Some("Ewhy"), Err("why".to_owned())), (None, Ok(true))] {
            let (ours, theirs) = status_pair().unwrap();
            if let Some(report) = report {
                nix::sys::socket::send(theirs.as_raw_fd(), report.as_bytes(), MsgFlags::MSG_NOSIGNAL)
                    .unwrap();
            }
            drop(theirs);
            assert_eq!(listen(&ours).map(|terminal| terminal.is_none()), heard);
        }
    }
}

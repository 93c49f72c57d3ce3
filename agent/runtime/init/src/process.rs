//! The last steps of a container's process: who it is, what it may do, and the program it becomes.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use weft_agent_runtime_init::wire::Process;

use crate::identity::{self, Identity};
use crate::rootfs::Context;
use crate::sys;

/// Standard streams of a process; what is missing is `/dev/null`.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// A terminal instead of the three.
    pub(crate) tty: Option<OwnedFd>,
}

/// Filters read before the root changes.
pub(crate) struct Filters(Vec<Vec<u8>>);

impl Filters {
    pub(crate) fn read(process: &Process) -> Result<Self, String> {
        let read =
            |path: &PathBuf| fs::read(path).context(|| format!("read the seccomp filter {}", path.display()));
        Ok(Self(process.seccomp.iter().map(read).collect::<Result<_, _>>()?))
    }

    fn install(&self) -> Result<(), String> {
        self.0.iter().try_for_each(|filter| sys::seccomp(filter)).context(|| "install seccomp".to_owned())
    }
}

/// Becomes the program. Returns only on failure.
pub(crate) fn become_program(
    process: &Process,
    argv: &[String],
    streams: &Streams,
    filters: &Filters,
) -> Result<Infallible, String> {
    let who = identity::resolve(&process.user)?;
    std::env::set_current_dir(&process.cwd).context(|| format!("chdir to cwd ({:?})", process.cwd))?;
    umask(Mode::from_bits_truncate(0o022));
    let mut env = process.env.clone();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", who.home));
    }
    connect(streams, &who)?;
    sys::reset_signals().context(|| "reset signals".to_owned())?;
    confine(process, &who, filters)?;
    // The death of the init must not leave a container that nobody watches.
    sys::prctl(libc::PR_SET_PDEATHSIG, u64::from(libc::SIGKILL.cast_unsigned()))
        .context(|| "set death signal".to_owned())?;
    let program = look_up(argv, &env)?;
    sys::close_on_exec_from(3).context(|| "close descriptors".to_owned())?;
    let error = sys::exec(&c_string(&program.to_string_lossy())?, &c_strings(argv)?, &c_strings(&env)?);
    Err(format!("exec {program:?}: {}", reason(&error)))
}

fn confine(process: &Process, who: &Identity, filters: &Filters) -> Result<(), String> {
    let available = sys::capabilities().context(|| "read capabilities".to_owned())?;
    let wanted = process.capabilities & available;
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, so it goes in before capabilities are given up.
    if !process.no_new_privs {
        filters.install()?;
    }
    for bit in (0..64).filter(|bit| available & (1 << bit) != 0 && wanted & (1 << bit) == 0) {
        sys::prctl(libc::PR_CAPBSET_DROP, bit).context(|| format!("drop capability {bit}"))?;
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1).context(|| "keep capabilities".to_owned())?;
    sys::set_ids(who.uid, who.gid, &who.groups)
        .context(|| format!("become user {} group {}", who.uid, who.gid))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0).context(|| "keep capabilities".to_owned())?;
    sys::set_capabilities(wanted).context(|| "set capabilities".to_owned())?;
    if process.no_new_privs {
        sys::prctl_no_new_privs().context(|| "set no_new_privs".to_owned())?;
        filters.install()?;
    }
    Ok(())
}

fn connect(streams: &Streams, who: &Identity) -> Result<(), String> {
    let null =
        File::options().read(true).write(true).open("/dev/null").context(|| "open /dev/null".to_owned())?;
    let put = |stream: Option<&OwnedFd>, number: i32| {
        let fd = stream.map_or(null.as_fd(), AsFd::as_fd);
        own(fd, who);
        sys::dup_to(fd, number).context(|| format!("connect stream {number}"))
    };
    if let Some(tty) = &streams.tty {
        sys::set_controlling_terminal(tty.as_fd()).context(|| "take the terminal".to_owned())?;
        return (0..3).try_for_each(|number| put(Some(tty), number));
    }
    put(streams.stdin.as_ref(), 0)?;
    put(streams.stdout.as_ref(), 1)?;
    put(streams.stderr.as_ref(), 2)
}

/// Lets a user who isn't root reopen its streams by `/dev/stdout`.
fn own(fd: BorrowedFd<'_>, who: &Identity) {
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let Ok(meta) = fs::metadata(&path) else { return };
    let terminal = meta.file_type().is_char_device() && nix::unistd::isatty(fd).unwrap_or(false);
    if (meta.file_type().is_fifo() || terminal) && meta.uid() != who.uid {
        // Only convenience: a stream whose owner can't be changed still works as it was handed down.
        let _ = nix::unistd::fchown(fd, Some(who.uid.into()), None);
    }
}

/// Finds the program as Go's exec.LookPath does, with its messages, which clients of other runtimes know.
fn look_up(argv: &[String], env: &[String]) -> Result<PathBuf, String> {
    let name = argv.first().filter(|name| !name.is_empty()).ok_or("no command specified")?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(why) if why == NOT_THERE => Err(format!("exec: {name:?}: stat {name}: {why}")),
            Err(why) => Err(format!("exec: {name:?}: {why}")),
        };
    }
    let path = env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or("");
    let mut refused = None;
    for folder in path.split(':') {
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) if why == DENIED => refused = Some(why),
            Err(_) => {}
        }
    }
    Err(format!("exec: {name:?}: {}", refused.unwrap_or("executable file not found in $PATH")))
}

const NOT_THERE: &str = "no such file or directory";
const DENIED: &str = "permission denied";

fn executable(path: &Path) -> Result<(), &'static str> {
    let meta = fs::metadata(path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::PermissionDenied { DENIED } else { NOT_THERE }
    })?;
    if meta.is_dir() {
        return Err("is a directory");
    }
    if meta.mode() & 0o111 == 0 { Err(DENIED) } else { Ok(()) }
}

/// The kernel's reason in the words of C programs, without Rust's number.
fn reason(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOEXEC) => "exec format error".to_owned(),
        Some(libc::ENOENT) => NOT_THERE.to_owned(),
        Some(libc::EACCES) => DENIED.to_owned(),
        Some(_) | None => error.to_string(),
    }
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).context(|| format!("{text:?} holds a zero byte"))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, String> {
    texts.iter().map(|text| c_string(text)).collect()
}

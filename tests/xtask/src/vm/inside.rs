//! The work within the machine: makes a Debian of it, runs the programs, and says what they said.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use nix::unistd::{gethostname, sethostname};

use super::initramfs::DISK;
use super::job::{Cgroups, Job, Mark, Program};
use crate::deadline;
use crate::steps::quiet;

/// The second serial port, which the host reads.
const PORT: &str = "/dev/ttyS1";
const SKIPS: &str = "/run/skipped-tests.txt";
/// Folders on the disk itself: the root is an overlay, on which no other can be laid.
const SCRATCH: &str = "/var/tmp";
const STATE: &str = "/var/lib";
const CONTROLLERS: [&str; 8] = ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids"];

/// Does the job that a file holds.
pub(crate) fn run(job: &Path) -> anyhow::Result<()> {
    // What lies at /proc is the host's still.
    ensure!(
        gethostname()? == "(none)",
        "this machine has a name, so it was not just booted: it would be taken apart"
    );
    let job = fs::read(job).with_context(|| format!("cannot read {}", job.display()))?;
    let job: Job = serde_json::from_slice(&job).context("cannot read the job")?;
    furnish(&job)?;
    let mut port = port()?;
    for program in &job.programs {
        say(&mut port, &Mark::Begin { program: program.name.clone() })?;
        let wrong = work(program, &job, &port).err().map(|error| format!("{error:#}"));
        for line in fs::read_to_string(SKIPS).unwrap_or_default().lines() {
            say(&mut port, &Mark::Skip { line: line.to_owned() })?;
        }
        say(&mut port, &Mark::End { program: program.name.clone(), wrong })?;
    }
    say(&mut port, &Mark::Done)?;
    tcdrain(&port).context("the port keeps what was said")
}

/// What the first process of a Debian does before it starts services.
fn furnish(job: &Job) -> anyhow::Result<()> {
    mounted("proc", "/proc", "")?;
    mounted("sysfs", "/sys", "")?;
    mounted("devtmpfs", "/dev", "")?;
    mounted("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=000")?;
    for memory in ["/dev/shm", "/run"] {
        mounted("tmpfs", memory, "mode=755")?;
    }
    disk()?;
    mounted("bpf", "/sys/fs/bpf", "mode=700")?;
    cgroups(job.cgroups)?;
    let none = None::<&str>;
    let release = job.modules.file_name().context("the modules have no folder")?;
    let modules = Path::new("/lib/modules").join(release);
    fs::create_dir_all(&modules)?;
    mount(Some(&job.modules), &modules, none, MsFlags::MS_BIND, none).context("mount the modules")?;
    for module in &job.load {
        quiet(Command::new("/sbin/modprobe").arg(module))?;
    }
    mount(none, "/", none, MsFlags::MS_SHARED | MsFlags::MS_REC, none).context("share the mounts")?;
    sethostname("debian")?;
    quiet(Command::new("/sbin/ip").args(["link", "set", "lo", "up"]))?;
    // What systemd sets.
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 1 << 20).context("allow more open files")
}

/// Lays folders of the disk where plain ones are needed.
fn disk() -> anyhow::Result<()> {
    let (whole, none) = (Path::new("/run/disk"), None::<&str>);
    fs::create_dir(whole)?;
    mount(Some(DISK), whole, Some("ext4"), MsFlags::empty(), none).context("mount the disk")?;
    for (name, place, mode) in [("scratch", SCRATCH, 0o1777), ("state", STATE, 0o755)] {
        let folder = whole.join(name);
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode))?;
        fs::create_dir_all(place)?;
        mount(Some(&folder), place, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("mount {place}"))?;
    }
    umount(whole).context("let go of the disk")?;
    fs::remove_dir(whole).context("remove the disk's place")
}

fn mounted(kind: &str, place: &str, options: &str) -> anyhow::Result<()> {
    fs::create_dir_all(place).with_context(|| format!("cannot make {place}"))?;
    mount(Some(kind), place, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mount {kind} at {place}"))
}

fn cgroups(version: Cgroups) -> anyhow::Result<()> {
    let root = "/sys/fs/cgroup";
    match version {
        Cgroups::V2 => mounted("cgroup2", root, ""),
        Cgroups::V1 => {
            mounted("tmpfs", root, "mode=755")?;
            CONTROLLERS.iter().try_for_each(|name| mounted_controller(&format!("{root}/{name}"), name))
        }
    }
}

fn mounted_controller(place: &str, controller: &str) -> anyhow::Result<()> {
    fs::create_dir(place)?;
    mount(Some("cgroup"), place, Some("cgroup"), MsFlags::empty(), Some(controller))
        .with_context(|| format!("mount the controller {controller}"))
}

/// The way to the host, which takes bytes as they are.
fn port() -> anyhow::Result<fs::File> {
    let port = open(PORT, OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty()).context("open the serial port")?;
    let mut settings = tcgetattr(&port)?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings)?;
    Ok(port.into())
}

fn say(port: &mut fs::File, mark: &Mark) -> anyhow::Result<()> {
    // A program that was ended may have left half a line.
    writeln!(port, "\n{}", mark.line()?).context("write to the host")
}

fn work(program: &Program, job: &Job, port: &fs::File) -> anyhow::Result<()> {
    if Path::new(SKIPS).exists() {
        fs::remove_file(SKIPS)?;
    }
    let mut command = Command::new(&program.path);
    command.args(&program.args).args(&program.tests).current_dir(&program.folder);
    command.env_clear().envs(job.environment.iter().cloned());
    command.env("HOME", "/root").env("TMPDIR", SCRATCH).env("WEFT_SKIP_LOG", SKIPS);
    command.stdin(Stdio::null()).stdout(port.try_clone()?).stderr(port.try_clone()?);
    deadline::end(&mut command)
}

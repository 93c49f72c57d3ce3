//! Runs one machine from its start to its end, or to the deadline.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::initramfs::{self, HOST_TAG};
use super::job::Job;
use super::kernel::Kernel;
use crate::steps::quiet;

pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// A file with holes: it takes what is written.
const DISK_SIZE: &str = "8G";
/// Several times what a machine takes on two cores.
const DEADLINE: Duration = Duration::from_mins(15);

/// What became of a machine.
pub(super) struct Said {
    /// What the work within wrote.
    pub(super) output: String,
    /// What the kernel wrote.
    pub(super) console: String,
    /// It was ended at the deadline.
    pub(super) late: bool,
}

/// Boots a machine that does `job` and goes off. `folder` gets what it is made of and what it says.
pub(super) fn boot(kernel: &Kernel, job: &Job, folder: &Path) -> anyhow::Result<Said> {
    let paper = folder.join("job.json");
    fs::write(&paper, serde_json::to_vec_pretty(job)?)
        .with_context(|| format!("cannot write {}", paper.display()))?;
    let initramfs = folder.join("initramfs.cpio");
    let worker = std::env::current_exe().context("find this program")?;
    let worker = format!("{} work-in-vm {}", quoted(&worker)?, quoted(&paper)?);
    initramfs::write(kernel, &worker, &initramfs)?;
    let disk = folder.join("disk.img");
    quiet(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk).arg(DISK_SIZE))?;
    let console = folder.join("console.log");
    let mut child = command(kernel, &initramfs, &disk, &console)
        .spawn()
        .with_context(|| format!("cannot run {PROGRAM}"))?;
    let stream = child.stdout.take().context("the emulator has no output")?;
    let (output, late) = follow(&mut child, stream, &folder.join("output.log"))?;
    fs::remove_file(&disk).context("remove the disk")?;
    let console = fs::read(&console).with_context(|| format!("cannot read {}", console.display()))?;
    Ok(Said { output, console: String::from_utf8_lossy(&console).into_owned(), late })
}

/// A path for a shell's command line within single quotes: it is quoted with double ones.
fn quoted(path: &Path) -> anyhow::Result<String> {
    let plain = |letter: char| letter.is_alphanumeric() || "/._-+@ ".contains(letter);
    let text = path.to_str().filter(|text| text.chars().all(plain));
    let text =
        text.with_context(|| format!("{} has letters that a shell may take otherwise", path.display()))?;
    Ok(format!("\"{text}\""))
}

fn command(kernel: &Kernel, initramfs: &Path, disk: &Path, console: &Path) -> Command {
    // The emulator goes with this program, however that ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", PROGRAM]);
    if virtualizes() {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        // Page tables of five levels only take the emulator longer.
        command.args(["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,la57=off"]);
    }
    // No devices but those named, no network, and a machine that starts anew is one that goes off.
    command.args(["-nodefaults", "-display", "none", "-no-reboot", "-m", "4096", "-smp", "2"]);
    command
        .arg("-fsdev")
        .arg(format!("local,id={HOST_TAG},path=/,security_model=none,readonly=on,multidevs=remap"));
    command.arg("-device").arg(format!("virtio-9p-pci,fsdev={HOST_TAG},mount_tag={HOST_TAG}"));
    // What is on the disk need not outlive the machine.
    command.arg("-drive").arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()));
    command.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    // A kernel that finds itself wrong ends the machine. Guards against the real processor's leaks cost much here and guard nothing.
    command.args(["-append", "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Whether the processor itself runs machines. The device alone says little: it may be there and hang.
fn virtualizes() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flagged = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    flagged && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Takes in what the machine writes until it is off; ends it at the deadline.
fn follow(child: &mut Child, stream: ChildStdout, log: &Path) -> anyhow::Result<(String, bool)> {
    let mut log = fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let begin = Instant::now();
    let (ended, end) = channel();
    let reader = std::thread::spawn(move || -> anyhow::Result<String> {
        // Dropped when this ends, which is the sign.
        let _ended: std::sync::mpsc::Sender<()> = ended;
        let mut output = String::new();
        for line in BufReader::new(stream).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(log, "{:6.1} {line}", begin.elapsed().as_secs_f64())?;
            writeln!(output, "{line}")?;
        }
        Ok(output)
    });
    let late = end.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout);
    if late {
        child.kill().context("end the emulator")?;
    }
    let output = reader.join().map_err(|panic| anyhow::anyhow!("the reader broke down: {panic:?}"))??;
    child.wait().context("wait for the emulator")?;
    Ok((output, late))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_a_shell_would_change_is_refused() {
        assert_eq!(quoted(Path::new("/folder/a b-1.x")).unwrap(), "\"/folder/a b-1.x\"");
        for path in ["/a$b", "/a'b", "/a\"b", "/a`b"] {
            assert!(quoted(Path::new(path)).is_err(), "{path}");
        }
    }
}

//! What the tests of every level share: skips that are counted, waits with a deadline, network namespaces, a cluster to test against.

pub mod cluster;
pub mod netns;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Programs to test against that no package has: who has built one puts it on PATH.
const PEERS: [&str; 2] = ["kube-proxy", "cnitool"];

/// What a kernel has or lacks: it can't be installed.
const KERNELS: [&str; 1] = ["sctp"];

/// Whether what a test needs is here: `root`, `bpf`, `ipv6`, `sctp`, `xdp`, `tcx`, `layers` (many in an image), `etcd`, `kubectl`,
/// `artifacts`, `weft`, `postgres-image`, or the name of any program.
///
/// A test that gets `false` returns at once; the skip is written to standard error and, for the summary of
/// `cargo xtask test`, to the file that `WEFT_SKIP_LOG` names.
///
/// # Panics
/// If something is missing that `WEFT_REQUIRE` (a comma-separated list, or `all` for what can be installed) says must be here.
pub fn require(test: &str, needs: &[&str]) -> bool {
    let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
    let required: Vec<&str> = required.split(',').map(str::trim).collect();
    for need in needs {
        let Err(reason) = present(need) else { continue };
        let forbidden = required.contains(need)
            || (required.contains(&"all") && !PEERS.contains(need) && !KERNELS.contains(need));
        assert!(!forbidden, "{test} needs {need}, and WEFT_REQUIRE forbids to skip it: {reason}");
        let line = format!("SKIP {test}: needs {need}: {reason}");
        eprintln!("{line}");
        if let Some(path) = std::env::var_os("WEFT_SKIP_LOG")
            && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
        {
            let _ = writeln!(log, "{line}");
        }
        return false;
    }
    true
}

fn present(need: &str) -> Result<(), String> {
    match need {
        "root" => {
            if nix::unistd::geteuid().is_root() {
                Ok(())
            } else {
                Err("not root".to_owned())
            }
        }
        "bpf" => {
            let unified = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
            let cgroup2 = unified.iter().any(|path| PathBuf::from(path).join("cgroup.procs").exists());
            if cgroup2 && nix::unistd::geteuid().is_root() {
                Ok(())
            } else {
                Err("no cgroup2 mount, or not root".to_owned())
            }
        }
        "ipv6" => match std::path::Path::new("/proc/sys/net/ipv6").is_dir() {
            true => Ok(()),
            false => Err("the kernel has no IPv6".to_owned()),
        },
        // A module, or built in.
        "sctp" => match std::path::Path::new("/proc/net/sctp").is_dir() {
            true => Ok(()),
            false => Err("the kernel has no SCTP, or its module is not loaded".to_owned()),
        },
        // Older ones don't say which devices take frames, so XDP hands none over.
        "xdp" => linux((6, 3)),
        // Older ones hook programs for packets by filters alone.
        "tcx" => linux((6, 6)),
        // Older ones take one list of layers, which must fit into a page.
        "layers" => linux((6, 7)),
        "artifacts" => artifact("weft.bpf.o").map(|_| ()),
        "weft" => weft_binary().map(|_| ()),
        program => which(program).map(|_| ()).ok_or_else(|| format!("no {program} on PATH")),
    }
}

/// Whether the kernel is of this version, or newer.
fn linux(wanted: (u32, u32)) -> Result<(), String> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = kernel.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(wanted.0), Some(wanted.1)) {
        Ok(())
    } else {
        Err(format!("Linux {} is older than {}.{}", kernel.trim(), wanted.0, wanted.1))
    }
}

/// A program's path, looked up on PATH.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The workspace's root.
pub fn workspace() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).map(PathBuf::from).unwrap_or(here)
}

/// One of the files that `cargo xtask build` lays into the artifacts' folder.
pub fn artifact(name: &str) -> Result<PathBuf, String> {
    let folder = std::env::var_os("WEFT_ARTIFACTS")
        .map_or_else(|| workspace().join("target").join("artifacts"), PathBuf::from);
    let path = folder.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("no {name} in the artifacts; run `cargo xtask build`"))
    }
}

/// The `weft` binary under test: `WEFT_BIN`, or the one that `cargo xtask build` made.
pub fn weft_binary() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("WEFT_BIN").map(PathBuf::from) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!("WEFT_BIN names no file: {}", path.display()))
        };
    }
    artifact("weft")
}

/// Waits until `condition` answers a value; looks again every 20 ms.
///
/// # Errors
/// With what was awaited, if `timeout` passes first.
pub fn wait_until<T>(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + timeout;
    let mut last = None;
    loop {
        match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        if Instant::now() >= deadline {
            let seconds = timeout.as_secs();
            return match last {
                Some(error) => Err(error.context(format!("waited {seconds} s until {what}"))),
                None => Err(anyhow::anyhow!("waited {seconds} s until {what}")),
            };
        }
        pause();
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place where a test waits between two looks")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

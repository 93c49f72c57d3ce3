//! What the machine says of itself: processors, load, time its processors were busy, memory of processes.

use std::collections::HashMap;
use std::fs;

use anyhow::Context as _;
use nix::sys::time::TimeValLike as _;
use nix::unistd::{SysconfVar, sysconf};

use crate::stats::as_f64;

/// One line: kernel, processors, load. Figures taken under another load are worth less, so it is said.
pub(crate) fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "Linux {}, {cores} processors, load {load} before the first row.\n",
        read("/proc/sys/kernel/osrelease")
    )
}

/// Seconds that all processors together were busy since boot, interrupts included.
pub(crate) fn busy_seconds() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    parse_busy(&stat)
        .map(|ticks| ticks / ticks_per_second())
        .context("/proc/stat has no line of all processors")
}

/// Ticks in user, nice, system, irq and softirq; idle, iowait and steal are no work of ours.
fn parse_busy(stat: &str) -> Option<f64> {
    let fields: Vec<f64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6].iter().map(|&index| fields.get(index)).sum()
}

pub(crate) fn ticks_per_second() -> f64 {
    match sysconf(SysconfVar::CLK_TCK) {
        Ok(Some(ticks)) => usize::try_from(ticks).map_or(100.0, as_f64),
        _ => 100.0,
    }
}

/// Seconds of processor time that this process used.
pub(crate) fn own_seconds() -> anyhow::Result<f64> {
    let usage =
        nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).context("getrusage")?;
    let used = usage.user_time() + usage.system_time();
    let micros = u32::try_from(used.num_microseconds() % 1_000_000).context("a time is never negative")?;
    let seconds = u32::try_from(used.num_seconds()).context("this process is young")?;
    Ok(f64::from(seconds) + f64::from(micros) / 1e6)
}

/// Resident megabytes of a process and all below it, shared pages counted for each.
pub(crate) fn resident_mb(root: u32) -> anyhow::Result<f64> {
    resident(&mut children()?, vec![root])
}

/// The same of all below some processes, without these.
pub(crate) fn resident_below_mb(roots: &[u32]) -> anyhow::Result<f64> {
    let mut children = children()?;
    let below = roots.iter().flat_map(|root| children.remove(root).unwrap_or_default()).collect();
    resident(&mut children, below)
}

/// The processes of the machine by their parents.
fn children() -> anyhow::Result<HashMap<u32, Vec<u32>>> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").context("read /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some(parent) = status_number(pid, "PPid:") {
            children.entry(u32::try_from(parent).unwrap_or(0)).or_default().push(pid);
        }
    }
    Ok(children)
}

fn resident(children: &mut HashMap<u32, Vec<u32>>, mut left: Vec<u32>) -> anyhow::Result<f64> {
    let mut kilobytes = 0;
    while let Some(pid) = left.pop() {
        // A process may end while it is looked at.
        kilobytes += status_number(pid, "VmRSS:").unwrap_or(0);
        left.extend(children.remove(&pid).unwrap_or_default());
    }
    anyhow::ensure!(kilobytes > 0, "the processes are gone");
    Ok(as_f64(kilobytes) * 1024.0 / 1e6)
}

fn status_number(pid: u32, field: &str) -> Option<usize> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_leaves_out_idle_iowait_and_steal() {
        assert_eq!(parse_busy("cpu  1 2 4 1000 1000 8 16 1000 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\n"), Some(31.0));
        assert_eq!(parse_busy("cpu  1 2\n"), None);
        assert_eq!(parse_busy(""), None);
    }
}

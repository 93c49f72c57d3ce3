//! The sandbox itself: its namespaces, host name, loopback, sysctls and shared memory, owned by this process.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use weft_agent_runtime_init::wire::Sandbox;

use crate::rootfs::Context;
use crate::sys;

/// Upstream's OOM score of a sandbox.
const OOM_SCORE_ADJ: &str = "-998";
/// Docker's default size of a container's shared memory.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// Makes the sandbox's namespaces and what belongs into them.
pub(crate) fn make(config: &Sandbox) -> Result<(), String> {
    // Refused without CAP_SYS_RESOURCE: then the init is as likely a victim as others.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    let mut namespaces = CloneFlags::empty();
    namespaces.set(CloneFlags::CLONE_NEWNET, config.netns.is_some());
    namespaces.set(CloneFlags::CLONE_NEWUTS, config.hostname.is_some());
    namespaces.set(CloneFlags::CLONE_NEWIPC, config.shm.is_some());
    unshare(namespaces).context(|| "make namespaces".to_owned())?;
    let none: Option<&str> = None;
    if let Some(path) = &config.netns {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .context(|| "open a socket".to_owned())?;
        sys::loopback_up(socket.as_fd()).context(|| "bring lo up".to_owned())?;
        File::create(path).context(|| format!("make {}", path.display()))?;
        mount(Some("/proc/self/ns/net"), path, none, MsFlags::MS_BIND, none)
            .context(|| format!("pin the network namespace to {}", path.display()))?;
    }
    if let Some(path) = &config.shm {
        fs::create_dir_all(path).context(|| format!("make {}", path.display()))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), path, Some("tmpfs"), flags, Some(SHM_OPTIONS))
            .context(|| "mount shared memory".to_owned())?;
    }
    if let Some(name) = &config.hostname {
        nix::unistd::sethostname(name).context(|| format!("set the host name {name:?}"))?;
    }
    config.sysctls.iter().try_for_each(|(name, value)| sysctl(name, value))
}

fn sysctl(name: &str, value: &str) -> Result<(), String> {
    let path = sysctl_path(name).ok_or_else(|| format!("sysctl {name:?} has no valid name"))?;
    fs::write(path, value).context(|| format!("set sysctl {name}"))
}

/// As sysctl(8): the first separator tells whether `.` or `/` separates.
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let slashes = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/');
    let parts: Vec<String> = if slashes {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|part| part.replace('/', ".")).collect()
    };
    let fine = parts.iter().all(|part| !part.is_empty() && part != "." && part != "..");
    fine.then(|| Path::new("/proc/sys").join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_below_their_folder() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward"), Some("/proc/sys/net/ipv4/ip_forward".into()));
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/rp_filter"),
            Some("/proc/sys/net/ipv4/conf/eth0.1/rp_filter".into())
        );
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.rp_filter"),
            Some("/proc/sys/net/ipv4/conf/eth0.1/rp_filter".into())
        );
        assert_eq!(sysctl_path("net/../../x"), None);
        assert_eq!(sysctl_path("net..x"), None);
    }
}

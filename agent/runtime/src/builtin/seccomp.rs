//! The default seccomp profile: what a container without a capability has no use for is refused.
//!
//! Two filters are stacked, because one can answer with one error only: system calls newer than this table get ENOSYS, so
//! that programs fall back to older ones, and what the container may not do gets EPERM. Both let ordinary calls pass
//! unconditionally, which the kernel remembers in a bitmap: they cost nothing per call.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{records, security};
use crate::{Error, Security};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The last system call that this table knows: `mseal` of Linux 6.10. Numbers are the same on all architectures here.
const LAST: i64 = 462;
/// Flags of clone and unshare that make namespaces.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];
/// Personalities that harmless programs ask for, the last one only to read it.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// AF_ALG and AF_VSOCK: kernel interfaces that no namespace confines.
const FAMILIES: [u64; 2] = [38, 40];

/// Refused to all.
const NEVER: [i64; 16] = [
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_userfaultfd,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_nfsservctl,
    libc::SYS_pivot_root,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_lookup_dcookie,
];
#[cfg(target_arch = "x86_64")]
const NEVER_HERE: [i64; 4] = [libc::SYS__sysctl, libc::SYS_sysfs, libc::SYS_uselib, libc::SYS_ustat];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: [i64; 0] = [];

/// Refused without any of these capabilities.
const NEEDS: [(&[&str], &[i64]); 11] = [
    (
        &["SYS_ADMIN"],
        &[
            libc::SYS_fanotify_init,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_mount,
            libc::SYS_mount_setattr,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_quotactl,
            QUOTACTL_FD,
            libc::SYS_setdomainname,
            libc::SYS_sethostname,
            libc::SYS_setns,
            libc::SYS_umount2,
            libc::SYS_unshare,
        ],
    ),
    (&["SYS_ADMIN", "BPF"], &[libc::SYS_bpf]),
    (&["SYS_ADMIN", "PERFMON"], &[libc::SYS_perf_event_open]),
    (&["SYS_ADMIN", "SYSLOG"], &[libc::SYS_syslog]),
    (&["DAC_READ_SEARCH"], &[libc::SYS_open_by_handle_at]),
    (&["SYS_BOOT"], &[libc::SYS_reboot]),
    (&["SYS_CHROOT"], &[libc::SYS_chroot]),
    (&["SYS_MODULE"], &[libc::SYS_delete_module, libc::SYS_finit_module, libc::SYS_init_module]),
    (
        &["SYS_NICE"],
        &[libc::SYS_get_mempolicy, libc::SYS_mbind, libc::SYS_set_mempolicy, SET_MEMPOLICY_HOME_NODE],
    ),
    (&["SYS_PACCT"], &[libc::SYS_acct]),
    (&["SYS_TIME"], &[libc::SYS_clock_adjtime, libc::SYS_clock_settime, libc::SYS_settimeofday]),
];
#[cfg(target_arch = "x86_64")]
const NEEDS_HERE: [(&[&str], &[i64]); 2] =
    [(&["SYS_RAWIO"], &[libc::SYS_iopl, libc::SYS_ioperm]), (&["SYS_TTY_CONFIG"], &[libc::SYS_vhangup])];
#[cfg(not(target_arch = "x86_64"))]
const NEEDS_HERE: [(&[&str], &[i64]); 1] = [(&["SYS_TTY_CONFIG"], &[libc::SYS_vhangup])];

/// Linux 5.14.
const QUOTACTL_FD: i64 = 443;
/// Linux 5.17.
const SET_MEMPOLICY_HOME_NODE: i64 = 450;

/// Filters of a container, as files that its init reads. Containers with the same capabilities share them.
pub(super) fn filters(folder: &Path, security: &Security) -> Result<Vec<PathBuf>, Error> {
    if security.privileged || !security.seccomp_default {
        return Ok(Vec::new());
    }
    let capabilities = security::capabilities(security)?;
    let admin = capabilities & security::mask_of("SYS_ADMIN") != 0;
    let known = folder.join(if admin { "known-clone3.bpf" } else { "known.bpf" });
    keep(&known, || {
        compile(known_calls(admin), SeccompAction::Errno(errno(libc::ENOSYS)), SeccompAction::Allow)
    })?;
    let denied = folder.join(format!("denied-{capabilities:016x}.bpf"));
    let rules = denied_calls(capabilities)?;
    keep(&denied, || compile(rules, SeccompAction::Allow, SeccompAction::Errno(errno(libc::EPERM))))?;
    Ok(vec![known, denied])
}

fn errno(number: i32) -> u32 {
    number.unsigned_abs()
}

fn keep(path: &Path, compile: impl FnOnce() -> Result<Vec<u8>, Error>) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let aside = path.with_extension(super::new_id());
    std::fs::write(&aside, compile()?).map_err(records::io_error("write", &aside))?;
    std::fs::rename(&aside, path).map_err(records::io_error("write", path))
}

/// `clone3` hides its flags from filters: without it programs use `clone`, whose flags can be judged.
fn known_calls(clone3: bool) -> Rules {
    (0..=LAST).filter(|call| clone3 || *call != libc::SYS_clone3).map(|call| (call, Vec::new())).collect()
}

fn denied_calls(capabilities: u64) -> Result<Rules, Error> {
    let mut rules: Rules = NEVER.iter().chain(&NEVER_HERE).map(|call| (*call, Vec::new())).collect();
    for (needed, calls) in NEEDS.iter().chain(&NEEDS_HERE) {
        let allowed = needed.iter().any(|name| capabilities & security::mask_of(name) != 0);
        if !allowed {
            rules.extend(calls.iter().map(|call| (*call, Vec::new())));
        }
    }
    let condition = |op, value| SeccompCondition::new(0, SeccompCmpArgLen::Qword, op, value);
    let rule = |conditions: Result<Vec<_>, _>| {
        conditions.and_then(SeccompRule::new).map_err(|error| invalid(&error))
    };
    if capabilities & security::mask_of("SYS_ADMIN") == 0 {
        let flags = NAMESPACES.map(|flag| u64::from(flag.cast_unsigned()));
        let clone =
            flags.map(|flag| rule(condition(SeccompCmpOp::MaskedEq(flag), flag).map(|one| vec![one])));
        rules.insert(libc::SYS_clone, clone.into_iter().collect::<Result<_, _>>()?);
    }
    let other = PERSONALITIES.map(|value| condition(SeccompCmpOp::Ne, value));
    rules.insert(libc::SYS_personality, vec![rule(other.into_iter().collect())?]);
    let sockets = FAMILIES.map(|family| rule(condition(SeccompCmpOp::Eq, family).map(|one| vec![one])));
    rules.insert(libc::SYS_socket, sockets.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

fn compile(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> Result<Vec<u8>, Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| invalid(&error))?;
    let filter = SeccompFilter::new(rules, mismatch, matched, arch).map_err(|error| invalid(&error))?;
    let program = seccompiler::BpfProgram::try_from(filter).map_err(|error| invalid(&error))?;
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_ne_bytes());
    }
    Ok(bytes)
}

fn invalid(error: &seccompiler::BackendError) -> Error {
    Error::Invalid { what: "compile the seccomp profile", reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_open_what_they_are_for() {
        let denied = |capabilities| denied_calls(capabilities).unwrap();
        let (none, admin) = (denied(0), denied(security::mask_of("SYS_ADMIN")));
        assert!(none.contains_key(&libc::SYS_mount) && !admin.contains_key(&libc::SYS_mount));
        assert!(none.contains_key(&libc::SYS_clone) && !admin.contains_key(&libc::SYS_clone));
        assert!(!denied(security::mask_of("BPF")).contains_key(&libc::SYS_bpf));
        assert!(admin.contains_key(&libc::SYS_kexec_load));
        assert!(!none.contains_key(&libc::SYS_execve) && !none.contains_key(&libc::SYS_seccomp));
    }

    #[test]
    fn filters_fit_the_kernels_limit() {
        let most = compile(denied_calls(0).unwrap(), SeccompAction::Allow, SeccompAction::Errno(1)).unwrap();
        let known = compile(known_calls(true), SeccompAction::Errno(38), SeccompAction::Allow).unwrap();
        assert!(most.len() / 8 <= 4096 && known.len() / 8 <= 4096);
    }
}

//! What a container may do: capabilities by name.

use crate::{Error, Security};

/// Linux capabilities by bit.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// The set that every other runtime gives by default.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The bit of a capability, with or without `CAP_`.
fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|known| *known == short).map(|index| 1 << index)
}

/// One capability that is known to exist.
pub(super) fn mask_of(name: &'static str) -> u64 {
    bit(name).unwrap_or(0)
}

/// The capabilities of a container.
pub(super) fn capabilities(security: &Security) -> Result<u64, Error> {
    if security.privileged {
        return Ok(u64::MAX);
    }
    let bits = |names: &[String]| -> Result<(u64, bool), Error> {
        let (mut mask, mut all) = (0, false);
        for name in names {
            if name.eq_ignore_ascii_case("ALL") {
                all = true;
                continue;
            }
            let unknown = || Error::Invalid {
                what: "set capabilities",
                reason: format!("unknown capability {name:?}"),
            };
            mask |= bit(name).ok_or_else(unknown)?;
        }
        Ok((mask, all))
    };
    let ((add, add_all), (drop, drop_all)) =
        (bits(&security.add_capabilities)?, bits(&security.drop_capabilities)?);
    let default = DEFAULT.iter().filter_map(|name| bit(name)).fold(0, |mask, bit| mask | bit);
    Ok(match (add_all, drop_all) {
        (true, _) => !drop,
        (false, true) => add & !drop,
        (false, false) => (default | add) & !drop,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(add: &[&str], drop: &[&str]) -> Security {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Security { add_capabilities: own(add), drop_capabilities: own(drop), ..Security::default() }
    }

    #[test]
    fn additions_and_drops_combine_as_elsewhere() {
        let all = |add, drop| capabilities(&security(add, drop)).unwrap();
        assert_eq!(all(&[], &[]), 0xa804_25fb);
        assert_eq!(all(&["NET_ADMIN"], &["ALL"]), 1 << 12);
        assert_eq!(all(&["cap_net_admin"], &["NET_RAW"]), (0xa804_25fb | 1 << 12) & !(1 << 13));
        assert_eq!(all(&["ALL"], &["SYS_ADMIN"]), !(1u64 << 21));
        assert!(capabilities(&security(&["NOPE"], &[])).is_err());
    }
}

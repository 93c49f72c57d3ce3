//! How a plugin is called: the environment (CNI 1.1.0 §2 Parameters).

use std::path::PathBuf;

use crate::Args;

/// What the plugin is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// See whether it is attached as ADD said.
    Check,
    /// Remove what belongs to no attachment that is still valid.
    Gc,
    /// Say whether ADD can be served.
    Status,
    /// Say which versions are spoken.
    Version,
}

/// A call's parameters. Which of them are there depends on the command, and is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What to do.
    pub command: Command,
    /// `CNI_CONTAINERID`; empty for GC, STATUS and VERSION.
    pub container: String,
    /// `CNI_NETNS`; DEL may come without.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`; empty for GC, STATUS and VERSION.
    pub ifname: String,
    /// `CNI_ARGS`; none for GC, STATUS and VERSION.
    pub args: Args,
}

/// What is wrong with a call's environment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Variables that the command needs are missing or empty.
    #[error("required env variables [{}] missing", .0.join(","))]
    Missing(Vec<&'static str>),
    /// The command isn't one.
    #[error("unknown CNI_COMMAND: {0}")]
    Unknown(String),
    /// A variable's value can't be used.
    #[error("invalid {name} {value:?}: {reason}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it held.
        value: String,
        /// Why not.
        reason: &'static str,
    },
}

/// The kernel's bound on a device's name, without the terminating NUL.
const IFNAME_BYTES: usize = 15;

impl Call {
    /// Reads a call from the environment, given as a look-up.
    ///
    /// # Errors
    /// If a variable that the command needs is missing, or has a value that can't be used.
    pub fn read(variable: impl Fn(&'static str) -> Option<String>) -> Result<Self, CallError> {
        let value = |name| variable(name).filter(|value| !value.is_empty());
        let command = match value("CNI_COMMAND").as_deref() {
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("GC") => Command::Gc,
            Some("STATUS") => Command::Status,
            Some("VERSION") => Command::Version,
            Some(other) => return Err(CallError::Unknown(other.to_owned())),
            None => return Err(CallError::Missing(vec!["CNI_COMMAND"])),
        };
        let needed: &[&'static str] = match command {
            Command::Add | Command::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Command::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Command::Gc | Command::Status => &["CNI_PATH"],
            Command::Version => &[],
        };
        let missing: Vec<_> = needed.iter().copied().filter(|name| value(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(CallError::Missing(missing));
        }
        let attached = matches!(command, Command::Add | Command::Del | Command::Check);
        let call = Self {
            command,
            container: value("CNI_CONTAINERID").filter(|_| attached).unwrap_or_default(),
            netns: value("CNI_NETNS").filter(|_| attached).map(PathBuf::from),
            ifname: value("CNI_IFNAME").filter(|_| attached).unwrap_or_default(),
            args: Args::read(&value("CNI_ARGS").filter(|_| attached).unwrap_or_default())?,
        };
        if attached {
            check_identifier("CNI_CONTAINERID", &call.container)?;
            check_ifname(&call.ifname)?;
        }
        Ok(call)
    }
}

/// Letters, digits, `_`, `.`, `-`, beginning with a letter or digit: for container ids and network names.
pub(crate) fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn check_identifier(name: &'static str, value: &str) -> Result<(), CallError> {
    if is_identifier(value) {
        return Ok(());
    }
    let reason = "letters, digits, '_', '.' and '-' only, the first a letter or digit";
    Err(CallError::Invalid { name, value: value.to_owned(), reason })
}

fn check_ifname(value: &str) -> Result<(), CallError> {
    let reason = if value.len() > IFNAME_BYTES {
        "more than 15 bytes"
    } else if value == "." || value == ".." {
        "a folder's name"
    } else if value.contains(['/', ':']) || value.contains(char::is_whitespace) {
        "contains '/', ':' or a space"
    } else {
        return Ok(());
    };
    Err(CallError::Invalid { name: "CNI_IFNAME", value: value.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Call, CallError> {
        let all = [("CNI_PATH", "/x")].iter().chain(pairs);
        let all: Vec<(String, String)> = all.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Call::read(|name| all.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
    }

    #[test]
    fn says_what_is_missing_per_command() {
        let missing = |command| match read(&[("CNI_COMMAND", command)]) {
            Err(CallError::Missing(names)) => names,
            other => panic!("{other:?}"),
        };
        assert_eq!(missing("ADD"), ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]);
        assert_eq!(missing("DEL"), ["CNI_CONTAINERID", "CNI_IFNAME"]);
        assert_eq!(missing("CHECK"), ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]);
        for command in ["GC", "STATUS", "VERSION"] {
            read(&[("CNI_COMMAND", command)]).unwrap();
        }
        assert_eq!(read(&[]), Err(CallError::Missing(vec!["CNI_COMMAND"])));
        assert_eq!(read(&[("CNI_COMMAND", "add")]), Err(CallError::Unknown("add".to_owned())));
    }

    #[test]
    fn refuses_names_that_the_kernel_or_the_disk_would_misread() {
        let call =
            |id, ifname| read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", id), ("CNI_IFNAME", ifname)]);
        call("a-1_2.3", "eth0").unwrap();
        for (id, ifname) in [
            ("../x", "eth0"),
            (".x", "eth0"),
            ("a/b", "eth0"),
            ("a", "a/b"),
            ("a", ".."),
            ("a", "a b"),
            ("a", "0123456789abcdef"),
        ] {
            assert!(matches!(call(id, ifname), Err(CallError::Invalid { .. })), "{id} {ifname}");
        }
    }
}

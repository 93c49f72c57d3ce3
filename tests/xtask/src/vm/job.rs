//! What a machine is told to do, and the lines by which it says how far it is. Both sides of the border use this file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How control groups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Cgroups {
    /// As Debian 12 does.
    V2,
    /// A mount for each controller, and none of version 2.
    V1,
}

/// What a machine does from its start to its end.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) cgroups: Cgroups,
    /// The kernel's modules, as they lie below `/lib/modules`.
    pub(super) modules: PathBuf,
    /// Those to load at once.
    pub(super) load: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    pub(super) programs: Vec<Program>,
}

/// A test program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Where it runs.
    pub(super) folder: PathBuf,
    pub(super) args: Vec<String>,
    /// Parts of the names of its tests; none stands for all.
    pub(super) tests: Vec<String>,
}

/// Begins each line that is the machine's own and no program's.
const MARK: &str = "@vm ";

/// What the machine itself says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Mark {
    /// What comes is said by this program.
    Begin { program: String },
    /// A test was skipped.
    Skip { line: String },
    /// The program is over.
    End { program: String, wrong: Option<String> },
    /// The machine has done all and goes off.
    Done,
}

impl Mark {
    /// The line that says it.
    pub(super) fn line(&self) -> serde_json::Result<String> {
        Ok(format!("{MARK}{}", serde_json::to_string(self)?))
    }

    /// Reads a line; `None` if it is a program's.
    pub(super) fn read(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim_end().strip_prefix(MARK)?).ok()
    }
}

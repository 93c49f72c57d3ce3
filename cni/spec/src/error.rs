//! Errors as a plugin reports them (CNI 1.1.0 §5 Error).

use serde::Serialize;

use crate::Version;

/// The reason's number. Below 100 the specification gives them their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version isn't spoken.
    IncompatibleVersion,
    /// A field of the configuration isn't supported.
    UnsupportedField,
    /// The container, or its namespace, doesn't exist.
    UnknownContainer,
    /// An environment variable is missing or wrong.
    InvalidEnvironment,
    /// Reading or writing failed.
    Io,
    /// The configuration isn't JSON, or not of the form it must have.
    Decode,
    /// The configuration is well-formed but can't be carried out.
    InvalidConfig,
    /// The same call may succeed later.
    TryAgain,
    /// STATUS: no ADD can be served.
    NotAvailable,
    /// The kernel refused; ours.
    Kernel,
    /// CHECK found something else than ADD made; ours.
    CheckFailed,
}

impl Code {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::UnknownContainer => 3,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgain => 11,
            Self::NotAvailable => 50,
            Self::Kernel => 100,
            Self::CheckFailed => 101,
        }
    }
}

/// What a failed plugin prints to standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorReport {
    /// The version of the call, or the newest if it named none.
    pub cni_version: &'static str,
    /// The reason's number.
    pub code: u32,
    /// The reason in short.
    pub msg: String,
    /// The causes.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl ErrorReport {
    /// A report from an error and the errors behind it.
    pub fn new(version: Option<Version>, code: Code, error: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(error.source(), |error| error.source());
        Self {
            cni_version: version.unwrap_or(Version::V1_1_0).as_str(),
            code: code.number(),
            msg: error.to_string(),
            details: causes.map(ToString::to_string).collect::<Vec<_>>().join(": "),
        }
    }
}

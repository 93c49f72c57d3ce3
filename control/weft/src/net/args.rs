//! Flags of the commands about the network.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueEnum};

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// List the Services, and on how many nodes each is in the kernel
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show what the kernel of every node holds of a Service
    Show(ShowArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ListArgs {
    /// Only the Services of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub(crate) namespace: Option<String>,
    /// Write JSON
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ShowArgs {
    /// The Service: NAMESPACE/NAME, or NAME
    pub(crate) service: String,
    /// Namespace of a Service that is given by its name alone
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    pub(crate) namespace: String,
    /// Write JSON
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct WhyArgs {
    /// Who connects: a pod (NAMESPACE/NAME or NAME), a node (its name), or an address
    pub(crate) from: String,
    /// Where to: a Service or pod (NAMESPACE/NAME or NAME; svc/…, pod/… and node/… say which), a node or an address; and the port's number or name
    #[arg(value_name = "TO:PORT")]
    pub(crate) to: String,
    /// Namespace of what is given by its name alone
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    pub(crate) namespace: String,
    /// tcp, udp or sctp
    #[arg(long, default_value = "tcp")]
    pub(crate) protocol: weft_agent_dataplane::observe::wire::Protocol,
    /// Write JSON
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct FlowsArgs {
    /// Only flows from or to this pod: NAMESPACE/NAME, or NAME
    #[arg(long, value_name = "POD")]
    pub(crate) pod: Option<String>,
    /// Only flows to this Service: NAMESPACE/NAME, or NAME
    #[arg(long, value_name = "SERVICE")]
    pub(crate) service: Option<String>,
    /// Only what is refused or dropped
    #[arg(long)]
    pub(crate) drops: bool,
    /// Only what this node sees
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
    /// End after this many flows
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// Namespace of what is given by its name alone
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    pub(crate) namespace: String,
    /// Write JSON, one line a flow
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Watch the traffic of a namespace's pods, and write NetworkPolicies that allow what was seen
    Learn(LearnArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LearnArgs {
    /// The namespace
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) namespace: String,
    /// How long to watch: 90s, 10m, 2h
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
    pub(crate) duration: Duration,
    /// Who asks the API [default: the administrator]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
}

/// A number with its unit.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: 90s, 10m or 2h");
    let (number, seconds) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3_600),
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().ok().filter(|number| *number > 0).ok_or_else(wrong)?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// Let small pods on every node ask each other over every way that traffic takes, and remove them again
    Check(CheckArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CheckArgs {
    /// Image of the pods; it needs sh, wget, httpd, nslookup and timeout, and is never pulled
    #[arg(long, default_value = "busybox", value_name = "IMAGE")]
    pub(crate) image: String,
    /// Leave the pods and Services where they are
    #[arg(long)]
    pub(crate) keep: bool,
    /// Write JSON
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Write JSON
    #[arg(short, long, value_enum)]
    pub(crate) output: Option<Output>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7_200)));
        assert!(
            ["", "s", "0s", "5", "1.5m", "99999999999999999999h", "18446744073709551615m"]
                .iter()
                .all(|text| duration(text).is_err())
        );
    }
}

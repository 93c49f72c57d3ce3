//! What an operator decides on the ways of packets, on a cluster's command line and on that of each of its agents.

use clap::Args;
use ipnetwork::IpNetwork;
use weft_agent_dataplane::overlay::Routing;
use weft_agent_dataplane::xdp::Xdp;

#[derive(Clone, Debug, PartialEq, Args)]
pub(crate) struct Ways {
    /// Where XDP carries packets from outside to a node's pods, if the driver can: auto (all uplinks but veth pairs), always, never
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub(crate) xdp: Xdp,
    /// How packets get to pods of nodes on the same link: tunnel, native (a plain route), auto (native where packets with pods'
    /// addresses are seen to get there). Nodes behind a router are always reached by the tunnel
    #[arg(long, value_name = "MODE", default_value = "tunnel")]
    pub(crate) routing: Routing,
    /// Whether a node that hands a client's packets on to another node's pod leaves the client its address, and the other node answers it
    /// directly: on, off. The network must let nodes send from each other's addresses
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = on_or_off, action = clap::ArgAction::Set)]
    pub(crate) direct_return: bool,
    /// Where pods are seen by their own addresses, besides the cluster: what is there must know a way back to them. To all else they send
    /// from their node's address
    #[arg(long, value_name = "CIDR[,CIDR...]", value_delimiter = ',')]
    pub(crate) non_masquerade_cidrs: Vec<IpNetwork>,
}

impl Ways {
    /// The arguments that say the same to an agent.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--xdp={}", self.xdp),
            format!("--routing={}", self.routing),
            format!("--direct-return={}", if self.direct_return { "on" } else { "off" }),
        ];
        if !self.non_masquerade_cidrs.is_empty() {
            let ranges: Vec<_> = self.non_masquerade_cidrs.iter().map(ToString::to_string).collect();
            arguments.push(format!("--non-masquerade-cidrs={}", ranges.join(",")));
        }
        arguments
    }
}

fn on_or_off(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("neither on nor off"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        ways: Ways,
    }

    fn read(arguments: &[String]) -> Result<Ways, clap::Error> {
        Line::try_parse_from(std::iter::once("weft".to_owned()).chain(arguments.iter().cloned()))
            .map(|line| line.ways)
    }

    #[test]
    fn an_agent_is_told_what_the_cluster_was() {
        let given = [
            "--xdp=never",
            "--routing=auto",
            "--direct-return=on",
            "--non-masquerade-cidrs=192.0.2.0/24,2001:db8::/32",
        ];
        for given in [&given[..], &[]] {
            let ways = read(&given.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
            assert_eq!(read(&ways.arguments()).unwrap(), ways);
        }
        assert!(read(&["--non-masquerade-cidrs=somewhere".to_owned()]).is_err());
    }
}

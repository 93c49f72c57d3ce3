//! `CNI_ARGS`: further arguments, `KEY=value` with semicolons between them (CNI 1.1.0 §2 Parameters).

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::{CallError, HardwareAddress};

/// The arguments that are served. Those of Kubernetes name the pod and change nothing; others are refused unless
/// `IgnoreUnknown` is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `IP`: the addresses that the container must get, with commas between them.
    pub ips: Vec<IpAddr>,
    /// `MAC`: the hardware address that it must get.
    pub mac: Option<HardwareAddress>,
}

/// Arguments that say for whom a call is.
const ABOUT: [&str; 4] = ["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID", "K8S_POD_INFRA_CONTAINER_ID"];

impl Args {
    pub(crate) fn read(text: &str) -> Result<Self, CallError> {
        let mut args = Self::default();
        let (mut unknown, mut ignore) = (None, false);
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| invalid(pair, "not of the form KEY=value"))?;
            match key {
                "IgnoreUnknown" => {
                    ignore = truth(value).ok_or_else(|| invalid(pair, "neither true nor false"))?
                }
                "IP" => {
                    let ips = value.split(',').map(|one| one.parse().map(|network: IpNetwork| network.ip()));
                    args.ips = ips.collect::<Result<_, _>>().map_err(|_no_ip| invalid(pair, "no address"))?;
                }
                "MAC" => {
                    args.mac = Some(value.parse().map_err(|_no_mac| invalid(pair, "no hardware address"))?)
                }
                key if ABOUT.contains(&key) => {}
                _ => unknown = Some(pair),
            }
        }
        match unknown.filter(|_| !ignore) {
            Some(pair) => Err(invalid(pair, "not known, and IgnoreUnknown is not set")),
            None => Ok(args),
        }
    }
}

fn invalid(pair: &str, reason: &'static str) -> CallError {
    CallError::Invalid { name: "CNI_ARGS", value: pair.to_owned(), reason }
}

/// As the reference reads it.
fn truth(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_sends_and_what_is_asked_for() {
        assert_eq!(Args::read("").unwrap(), Args::default());
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;X=y=z";
        assert_eq!(Args::read(text).unwrap(), Args::default());
        let args = Args::read("IP=10.42.1.7,fd00::7/64;MAC=02:00:00:00:00:07").unwrap();
        assert_eq!(args.ips, ["10.42.1.7", "fd00::7"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(args.mac, Some(HardwareAddress([2, 0, 0, 0, 0, 7])));
        for wrong in ["X=y", "X=y;IgnoreUnknown=false", "IgnoreUnknown=maybe", "IP", "IP=x", "MAC=x"] {
            assert!(matches!(Args::read(wrong), Err(CallError::Invalid { .. })), "{wrong}");
        }
    }
}

//! The peer: the rules that kube-proxy in iptables mode makes of one Service.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use weft_tests_harness::netns::Netns;

use crate::stats::as_f64;

/// A Service: its address, and where its endpoints serve.
#[derive(Clone, Debug)]
pub(crate) struct Backed {
    pub(crate) vip: SocketAddrV4,
    pub(crate) pods: Vec<Ipv4Addr>,
    pub(crate) port: u16,
}

/// Loads the rules of these Services into a namespace, which they go with.
pub(crate) fn load_all(netns: &Netns, services: &[Backed]) -> anyhow::Result<()> {
    restore(netns, &text(services))
}

fn restore(netns: &Netns, text: &str) -> anyhow::Result<()> {
    let mut restore =
        netns.command("iptables-restore")?.stdin(Stdio::piped()).spawn().context("run iptables-restore")?;
    restore.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    ensure!(restore.wait()?.success(), "iptables-restore refused the rules");
    Ok(())
}

/// Rules in a namespace; gone when dropped.
pub(crate) struct Rules<'a> {
    netns: &'a Netns,
}

impl<'a> Rules<'a> {
    /// Loads the rules.
    pub(super) fn load(
        netns: &'a Netns,
        vip: SocketAddrV4,
        pods: &[Ipv4Addr],
        port: u16,
    ) -> anyhow::Result<Self> {
        Self::load_text(netns, &text(&[Backed { vip, pods: pods.to_vec(), port }]))
    }

    /// Loads what iptables-restore reads.
    pub(crate) fn load_text(netns: &'a Netns, text: &str) -> anyhow::Result<Self> {
        let rules = Self { netns };
        restore(netns, text)?;
        Ok(rules)
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        for table in ["nat", "filter"] {
            let removed = self
                .netns
                .command("nft")
                .and_then(|mut nft| Ok(nft.args(["delete", "table", "ip", table]).status()?));
            if !removed.as_ref().is_ok_and(std::process::ExitStatus::success) {
                eprintln!("cannot remove iptables' table {table}: {removed:?}");
            }
        }
    }
}

/// The input of iptables-restore. Chains and their order are kube-proxy's; the cluster's range is weft's default.
fn text(services: &[Backed]) -> String {
    let (mut declared, mut jumps, mut chains) = (String::new(), String::new(), String::new());
    for (number, service) in services.iter().enumerate() {
        let (address, vip_port) = (service.vip.ip(), service.vip.port());
        let of = format!(
            "-d {address}/32 -p tcp -m comment --comment \"default/s{number} cluster IP\" -m tcp --dport {vip_port}"
        );
        let _ = writeln!(declared, ":KUBE-SVC-{number} - [0:0]");
        let _ = writeln!(jumps, "-A KUBE-SERVICES {of} -j KUBE-SVC-{number}");
        let _ = writeln!(chains, "-A KUBE-SVC-{number} ! -s 10.42.0.0/16 {of} -j KUBE-MARK-MASQ");
        endpoints(&mut declared, &mut chains, number, service);
    }
    format!(
        "{FILTER}*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
{declared}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{jumps}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
{chains}COMMIT
"
    )
}

/// A chain for each endpoint, chosen with the share that is left.
fn endpoints(declared: &mut String, chains: &mut String, number: usize, service: &Backed) {
    let port = service.port;
    for (index, pod) in service.pods.iter().enumerate() {
        let _ = writeln!(declared, ":KUBE-SEP-{number}-{index} - [0:0]");
        let left = service.pods.len() - index;
        let choice = if left > 1 {
            format!("-m statistic --mode random --probability {:.10} ", 1.0 / as_f64(left))
        } else {
            String::new()
        };
        let (to, comment) =
            (format!("KUBE-SEP-{number}-{index}"), format!("-m comment --comment default/s{number}"));
        let name = format!("-m comment --comment \"default/s{number} -> {pod}:{port}\"");
        let _ = writeln!(chains, "-A KUBE-SVC-{number} {name} {choice}-j {to}");
        let _ = writeln!(chains, "-A {to} -s {pod}/32 {comment} -j KUBE-MARK-MASQ");
        let _ = writeln!(chains, "-A {to} -p tcp {comment} -m tcp -j DNAT --to-destination {pod}:{port}");
    }
}

/// The table that every packet passes.
pub(crate) const FILTER: &str = "*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_backend_gets_the_same_share() {
        let pods: Vec<Ipv4Addr> = (1..=4).map(|last| Ipv4Addr::new(10, 42, 0, last)).collect();
        let vip = SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 10), 80);
        let rules = text(&[Backed { vip, pods, port: 8080 }]);
        let mut left = 1.0;
        for (index, line) in rules.lines().filter(|line| line.starts_with("-A KUBE-SVC-0 -m")).enumerate() {
            let given = line
                .split("--probability ")
                .nth(1)
                .map_or(1.0, |rest| rest.split(' ').next().unwrap().parse().unwrap());
            assert!((left * given - 0.25_f64).abs() < 1e-6, "backend {index}: {line}");
            left -= left * given;
        }
        assert!(left.abs() < 1e-6, "{rules}");
        assert_eq!(rules.matches("-j DNAT --to-destination").count(), 4);
    }
}

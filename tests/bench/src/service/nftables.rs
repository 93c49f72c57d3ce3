//! Another peer: the table that kube-proxy in nftables mode makes, with its verdict maps.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use weft_tests_harness::netns::Netns;

use super::iptables::Backed;

/// Services whose chains are loaded at a time: the kernel's work for a transaction grows with the square of its chains.
const AT_A_TIME: usize = 500;

/// Loads the table of these Services into a namespace, which it goes with.
pub(crate) fn load(netns: &Netns, services: &[Backed]) -> anyhow::Result<()> {
    parts(services).iter().try_for_each(|part| run(netns, part))
}

/// The table in parts: first the chains, then what leads to them.
fn parts(services: &[Backed]) -> Vec<String> {
    let chains = services.chunks(AT_A_TIME).enumerate().map(|(part, some)| {
        let mut chains = String::new();
        for (number, Backed { vip, pods, port }) in (part * AT_A_TIME..).zip(some) {
            service(&mut chains, number, *vip, pods, *port);
        }
        table(&chains)
    });
    [table(MARK)].into_iter().chain(chains).chain([table(&maps(services))]).collect()
}

fn run(netns: &Netns, text: &str) -> anyhow::Result<()> {
    let mut nft = netns.command("nft")?.args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("run nft")?;
    nft.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    ensure!(nft.wait()?.success(), "nft refused the table");
    Ok(())
}

fn table(content: &str) -> String {
    format!("table ip kube-proxy {{\n{content}}}\n")
}

fn maps(services: &[Backed]) -> String {
    let (mut elements, mut addresses) = (Vec::new(), Vec::new());
    for (number, Backed { vip, .. }) in services.iter().enumerate() {
        elements.push(format!("{} . tcp . {} : goto service-{number}", vip.ip(), vip.port()));
        addresses.push(vip.ip().to_string());
    }
    let (elements, addresses) = (elements.join(", "), addresses.join(", "));
    format!(
        " map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}
 map service-nodeports {{ type inet_proto . inet_service : verdict; }}
 map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
 map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
 set cluster-ips {{ type ipv4_addr; elements = {{ {addresses} }}; }}
 set nodeport-ips {{ type ipv4_addr; elements = {{ 10.42.0.1 }}; }}
{BASE}"
    )
}

/// A chain for the Service, and one for each endpoint; each endpoint gets the same share.
fn service(out: &mut String, number: usize, vip: SocketAddrV4, pods: &[Ipv4Addr], port: u16) {
    let (address, vip_port) = (vip.ip(), vip.port());
    let mut shares = Vec::new();
    for (index, pod) in pods.iter().enumerate() {
        let _ = writeln!(
            out,
            " chain endpoint-{number}-{index} {{ ip saddr {pod} jump mark-for-masquerade; meta l4proto tcp dnat to {pod}:{port}; }}"
        );
        shares.push(format!("{index} : goto endpoint-{number}-{index}"));
    }
    let (count, shares) = (pods.len(), shares.join(", "));
    let _ = writeln!(
        out,
        " chain service-{number} {{ ip daddr {address} tcp dport {vip_port} ip saddr != 10.42.0.0/16 jump mark-for-masquerade; \
         numgen random mod {count} vmap {{ {shares} }}; }}"
    );
}

/// What the Services' chains need.
const MARK: &str = " chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
";

/// What is there whatever the Services are.
const BASE: &str = " chain masquerading { meta mark & 0x4000 == 0 return; meta mark set meta mark xor 0x4000; masquerade fully-random; }
 chain services {
  ip daddr . meta l4proto . th dport vmap @service-ips
  ip daddr @nodeport-ips ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
 }
 chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
 chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
 chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports; }
 chain cluster-ips-check { ip daddr @cluster-ips reject; }
 chain filter-prerouting-pre-dnat { type filter hook prerouting priority -110; ct state new jump firewall-check; }
 chain filter-output-pre-dnat { type filter hook output priority -110; ct state new jump firewall-check; }
 chain filter-input { type filter hook input priority 0; ct state new jump service-endpoints-check; }
 chain filter-forward { type filter hook forward priority 0; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
 chain filter-output { type filter hook output priority 0; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
 chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
 chain nat-output { type nat hook output priority -100; jump services; }
 chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_one_element_and_a_chain_for_each_endpoint() {
        let pods: Vec<Ipv4Addr> = (1..=4).map(|last| Ipv4Addr::new(10, 42, 0, last)).collect();
        let vip = |last| SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, last), 80);
        let count = AT_A_TIME + 3;
        let services: Vec<_> =
            (0..count).map(|_| Backed { vip: vip(1), pods: pods.clone(), port: 8080 }).collect();
        let parts = parts(&services);
        assert_eq!(parts.len(), 4, "the mark, twice chains, and maps");
        let (last, before) = parts.split_last().unwrap();
        let chains = before.concat();
        assert_eq!(chains.matches("dnat to").count(), 4 * count);
        assert_eq!(chains.matches("numgen random mod 4 vmap").count(), count);
        assert_eq!(last.matches(" : goto service-").count(), count);
        for number in [0, AT_A_TIME - 1, AT_A_TIME, count - 1] {
            assert_eq!(chains.matches(&format!(" chain service-{number} {{")).count(), 1, "{number}");
        }
        for part in parts {
            assert_eq!(part.matches('{').count(), part.matches('}').count());
        }
    }
}

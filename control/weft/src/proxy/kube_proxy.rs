//! What kube-proxy leaves on a node, and its removal: chains of iptables and tables of nftables.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// kube-proxy's chains; those that end in a hyphen are prefixes. The kubelet has others of its own (KUBE-FIREWALL,
/// KUBE-KUBELET-CANARY), which stay.
const CHAINS: [&str; 15] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-LOAD-BALANCER",
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-SEP-",
    "KUBE-FW-",
    "KUBE-EXT-",
    "KUBE-XLB-",
];

/// Stay behind when kube-proxy's rules go, and do nothing but to be there, a table of nftables or a chain of iptables' nat.
///
/// The kernel tracks connections in a network namespace only while some rule of any kind needs it to, and translates those that
/// it tracks only while there is a chain of type nat. With kube-proxy's rules these reasons may go, and then every connection
/// that they once directed would break.
const TABLE: &str = "weft-proxy";
const CHAIN: &str = "WEFT-PROXY";

/// Removes all of it; answers what there was. A program that is not installed has no rules.
pub(super) fn remove() -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for (save, restore) in [("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore")] {
        let Some(saved) = output(save, &[])? else { continue };
        let Some(script) = removal(&saved) else { continue };
        feed(restore, &["--noflush"], &script)?;
        removed.push(format!("chains of {}", save.trim_end_matches("-save")));
    }
    for family in ["ip", "ip6"] {
        let Some(tables) = output("nft", &["list", "tables", family])? else { continue };
        if has_table(&tables, family, "kube-proxy") {
            feed("nft", &["-f", "-"], &replacement(family))?;
            removed.push(format!("nftables' table {family} kube-proxy"));
        }
    }
    Ok(removed)
}

/// Removes what [`remove`] left in place of kube-proxy's rules.
pub(super) fn remove_replacement() -> anyhow::Result<()> {
    for (save, restore) in [("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore")] {
        let Some(saved) = output(save, &["-t", "nat"])? else { continue };
        if saved.lines().any(|line| line.starts_with(&format!(":{CHAIN} "))) {
            feed(restore, &["--noflush"], &format!("*nat\n-F {CHAIN}\n-X {CHAIN}\nCOMMIT\n"))?;
        }
    }
    for family in ["ip", "ip6"] {
        let Some(tables) = output("nft", &["list", "tables", family])? else { continue };
        if has_table(&tables, family, TABLE) {
            feed("nft", &["-f", "-"], &format!("delete table {family} {TABLE}\n"))?;
        }
    }
    Ok(())
}

fn has_table(tables: &str, family: &str, name: &str) -> bool {
    tables.lines().any(|line| line.trim() == format!("table {family} {name}"))
}

/// Input of `nft -f` that puts [`TABLE`] in the place of kube-proxy's, in one transaction.
fn replacement(family: &str) -> String {
    let mut script = format!("add table {family} {TABLE}\n");
    // Empty; new connections pass it.
    let _ = writeln!(script, "add chain {family} {TABLE} output {{ type nat hook output priority -100; }}");
    // No packet gets here.
    let _ = writeln!(script, "add chain {family} {TABLE} tracked");
    let _ = writeln!(script, "flush chain {family} {TABLE} tracked");
    let _ = writeln!(script, "add rule {family} {TABLE} tracked ct state invalid");
    let _ = writeln!(script, "delete table {family} kube-proxy");
    script
}

/// Standard output of a program; `None` if it is not installed.
fn output(program: &str, args: &[&str]) -> anyhow::Result<Option<String>> {
    let output = match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot run {program}")),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}", said.trim());
    Ok(Some(String::from_utf8(output.stdout).with_context(|| format!("{program} wrote no text"))?))
}

fn feed(program: &str, args: &[&str], input: &str) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().context("no way to its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

fn is_ours(chain: &str) -> bool {
    CHAINS.iter().any(|known| if known.ends_with('-') { chain.starts_with(known) } else { chain == *known })
}

/// From what `iptables-save` says, the input of `iptables-restore --noflush` that removes kube-proxy's part, in one
/// transaction for each table. `None` if there is nothing.
fn removal(saved: &str) -> Option<String> {
    let mut script = String::new();
    let mut table = "";
    let (mut chains, mut jumps) = (BTreeSet::new(), Vec::new());
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            if is_ours(chain) {
                chains.insert(chain);
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let from = rule.split(' ').next().unwrap_or_default();
            let to = rule.rsplit_once(" -j ").and_then(|(_, to)| to.split(' ').next());
            if !is_ours(from) && to.is_some_and(is_ours) {
                jumps.push(rule);
            }
        } else if line == "COMMIT" {
            write_table(&mut script, table, &std::mem::take(&mut chains), &std::mem::take(&mut jumps));
        }
    }
    (!script.is_empty()).then_some(script)
}

/// First nothing leads into the chains, then they are empty, then they go. No packet gets to the chain that stays.
fn write_table(script: &mut String, table: &str, chains: &BTreeSet<&str>, jumps: &[&str]) {
    if chains.is_empty() {
        return;
    }
    let _ = writeln!(script, "*{table}");
    if table == "nat" {
        let _ = writeln!(script, ":{CHAIN} - [0:0]\n-A {CHAIN} -m conntrack --ctstate INVALID");
    }
    for rule in jumps {
        let _ = writeln!(script, "-D {rule}");
    }
    for command in ["-F", "-X"] {
        for chain in chains {
            let _ = writeln!(script, "{command} {chain}");
        }
    }
    let _ = writeln!(script, "COMMIT");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translation_never_stops() {
        let script = replacement("ip6");
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(lines.first(), Some(&"add table ip6 weft-proxy"));
        assert_eq!(lines.last(), Some(&"delete table ip6 kube-proxy"));
        assert!(script.contains("tracked ct state invalid"), "{script}");
    }

    #[test]
    fn only_its_own_is_removed_jumps_first() {
        let saved = "# Generated
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-AAAA - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A PREROUTING -j MINE
-A KUBE-SERVICES -d 10.43.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-AAAA
COMMIT
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
";
        let expected = "*nat
:WEFT-PROXY - [0:0]
-A WEFT-PROXY -m conntrack --ctstate INVALID
-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-F KUBE-SERVICES
-F KUBE-SVC-AAAA
-X KUBE-SERVICES
-X KUBE-SVC-AAAA
COMMIT
";
        assert_eq!(removal(saved).as_deref(), Some(expected));
        assert_eq!(removal("*nat\n:MINE - [0:0]\nCOMMIT\n"), None);
        assert_eq!(removal(""), None);
    }
}

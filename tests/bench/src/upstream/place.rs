//! Where upstream's programs run: namespaces of their own for network, mounts, processes and the host's name, in which the folders that
//! they share by their defaults are fresh ones. A process holds it together; with that one all others end, and so all they mounted goes.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, ensure};
use weft_tests_harness::netns::{Netns, ip};

/// The node's address.
pub(super) const ADDRESS: &str = "10.77.0.1";
const NEIGHBOUR: &str = "10.77.0.2";

/// Kernel parameters that the kubelet sets, and to what. They are the whole machine's, so it finds files in their place that say they
/// are set already.
const PARAMETERS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// The first process: it lays out the mounts, says so, and then reaps orphans until its input ends, which it does in whatever way the
/// benchmark does.
const HOLD: &str = r#"set -e
hostname "$2"
mount -t tmpfs tmpfs /run
for folder in lib log; do mount --bind "$1/var/$folder" "/var/$folder"; done
cd "$1/sys"
find . -type f | while read -r file; do mount --bind "$file" "/proc/sys/$file"; done
cd /
echo laid out
exec 3<&0
cat <&3 >/dev/null &
wait $!
"#;

/// The namespaces and their first process.
pub(super) struct Place {
    pub(super) netns: Netns,
    holder: Option<(Child, ChildStdin)>,
}

impl Place {
    /// Lays it out; `data` is for what would lie below /var.
    pub(super) fn new(netns: Netns, data: &Path) -> anyhow::Result<Self> {
        uplink(netns.name())?;
        for folder in ["var/lib", "var/log"] {
            fs::create_dir_all(data.join(folder))?;
        }
        for (parameter, value) in PARAMETERS {
            let path = data.join("sys").join(parameter);
            fs::create_dir_all(path.parent().context("a parameter lies in a folder")?)?;
            fs::write(path, format!("{value}\n"))?;
        }
        let mut command = netns.command("unshare")?;
        command.args([
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            HOLD,
            "sh",
        ]);
        command.arg(data).arg(netns.name()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().context("run unshare")?;
        let said = holder.stdout.take().context("no output")?;
        let input = holder.stdin.take().context("no input")?;
        let place = Self { netns, holder: Some((holder, input)) };
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line).context("read what the place says")?;
        ensure!(line == "laid out\n", "the place for upstream's programs can't be laid out: {line:?}");
        Ok(place)
    }

    /// The process above its first one, to which orphans come.
    pub(super) fn holder(&self) -> anyhow::Result<u32> {
        Ok(self.holder.as_ref().context("the place has ended")?.0.id())
    }

    /// A command that will run in it.
    pub(super) fn command(&self, program: &Path) -> anyhow::Result<Command> {
        let of = |kind: &str| Ok::<_, anyhow::Error>(format!("/proc/{}/ns/{kind}", self.holder()?));
        let mut command = self.netns.command("nsenter")?;
        command.arg(format!("--mount={}", of("mnt")?)).arg(format!("--uts={}", of("uts")?));
        command.arg(format!("--pid={}", of("pid_for_children")?)).arg("--").arg(program);
        Ok(command)
    }

    /// Ends every process in it.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        let Some((mut holder, input)) = self.holder.take() else { return Ok(()) };
        drop(input);
        holder.wait().context("wait for the end of the place")?;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            let _ = writeln!(std::io::stderr(), "the place for upstream's programs has not ended: {error:#}");
        }
    }
}

/// A card with the node's address and a default route: what is sent to a Service must have a way before it is translated.
fn uplink(node: &str) -> anyhow::Result<()> {
    let run = |command: String| ip(&command.split(' ').collect::<Vec<_>>());
    run(format!("-n {node} link add uplink type veth peer name beyond"))?;
    run(format!("-n {node} addr add {ADDRESS}/24 dev uplink"))?;
    run(format!("-n {node} link set uplink up"))?;
    run(format!("-n {node} link set beyond up"))?;
    run(format!("-n {node} route add default via {NEIGHBOUR}"))
}

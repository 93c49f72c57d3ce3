//! Where log lines go: standard error, one line an event.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// The storage library reports its ordinary work as info.
const QUIET: &str = "fjall=warn,lsm_tree=warn";

/// Starts logging. A filter that can't be read is an error before anything else happens.
pub(crate) fn start(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().parse(format!("{QUIET},{filter}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

//! What an administrator sees of the network: `weft service`, `why`, `flows`, `policy learn`, `net check`, `doctor`.

pub(crate) mod args;
mod check;
mod doctor;
mod endpoints;
mod flows;
mod learn;
mod reach;
mod service;
mod table;
mod why;

use std::io::Write as _;
use std::process::ExitCode;

use crate::paths::Paths;
use args::{DoctorArgs, FlowsArgs, NetCommand, Output, PolicyCommand, ServiceCommand, WhyArgs};
use reach::Reach;

/// The question was answered, and the answer is no.
const NO: u8 = 1;
/// The question could not be answered.
const UNANSWERED: u8 = 2;

/// `weft service`.
pub(crate) fn service(paths: &Paths, command: &ServiceCommand) -> ExitCode {
    finish(paths, async |reach| match command {
        ServiceCommand::List(args) => service::list(&reach, args).await,
        ServiceCommand::Show(args) => service::show(&reach, args).await,
    })
}

/// `weft why`.
pub(crate) fn why(paths: &Paths, args: &WhyArgs) -> ExitCode {
    finish(paths, async |reach| why::why(&reach, args).await)
}

/// `weft doctor`.
pub(crate) fn doctor(paths: &Paths, args: &DoctorArgs) -> ExitCode {
    finish(paths, async |reach| doctor::doctor(&reach, args).await)
}

/// `weft net`.
pub(crate) fn net(paths: &Paths, command: &NetCommand) -> ExitCode {
    finish(paths, async |reach| match command {
        NetCommand::Check(args) => Box::pin(check::check(&reach, args)).await,
    })
}

/// `weft policy`.
pub(crate) fn policy(paths: &Paths, command: &PolicyCommand) -> ExitCode {
    let PolicyCommand::Learn(args) = command;
    let kubeconfig = args.kubeconfig.clone().unwrap_or_else(|| paths.admin_kubeconfig());
    let open = Reach::open_as(paths, &kubeconfig);
    answer(open, async |reach| Box::pin(learn::learn(&reach, args)).await)
}

/// `weft flows`.
pub(crate) fn flows(paths: &Paths, args: &FlowsArgs) -> ExitCode {
    finish(paths, async |reach| flows::flows(&reach, args).await)
}

/// What a command has to say, and whether the answer is yes.
struct Said {
    text: String,
    yes: bool,
}

impl Said {
    /// An answer as text or JSON.
    fn new(
        yes: bool,
        output: Option<Output>,
        text: String,
        json: &impl serde::Serialize,
    ) -> anyhow::Result<Self> {
        let text = match output {
            Some(Output::Json) => serde_json::to_string_pretty(json)? + "\n",
            None => text,
        };
        Ok(Self { text, yes })
    }
}

/// Runs a command and says how it ended: 0 for yes, 1 for no, 2 if there is no answer.
fn finish(paths: &Paths, command: impl AsyncFnOnce(Reach) -> anyhow::Result<Said>) -> ExitCode {
    answer(Reach::open(paths), command)
}

fn answer(
    open: impl Future<Output = anyhow::Result<Reach>>,
    command: impl AsyncFnOnce(Reach) -> anyhow::Result<Said>,
) -> ExitCode {
    let outcome = crate::up::runtime().and_then(|runtime| {
        runtime.block_on(async {
            let reach = open.await?;
            command(reach).await
        })
    });
    match outcome {
        Ok(said) => {
            // Whoever reads may have read enough.
            let _ = std::io::stdout().lock().write_all(said.text.as_bytes());
            if said.yes { ExitCode::SUCCESS } else { ExitCode::from(NO) }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(UNANSWERED)
        }
    }
}

//! `zitadel-tokens probe`: is an operator well. For `helm test`: the image has neither a shell nor curl.

use std::time::Duration;

use clap::Args;

/// Longest wait for the answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// What to ask.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Such as `http://zitadel-tokens.zitadel-tokens.svc:8080/readyz`.
    url: reqwest::Url,
}

/// Succeeds if the answer is a success.
pub fn probe(arguments: Arguments) -> Result<(), String> {
    super::choose_tls()?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("no runtime: {e}"))?;
    let status = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().timeout(PROBE_TIMEOUT).build()?;
        Ok(client.get(arguments.url).send().await?.status())
    });
    match status.map_err(|e: reqwest::Error| format!("no answer: {e}"))? {
        status if status.is_success() => Ok(()),
        status => Err(format!("the answer was {status}")),
    }
}

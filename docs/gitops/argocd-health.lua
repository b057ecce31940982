-- Argo CD's health check for ZitadelServiceUser and ZitadelInstance; docs/gitops.md explains its installation.
-- Needs no library, so useOpenLibs stays off.
local status = obj.status or {}
if obj.spec ~= nil and obj.spec.suspend == true then
  return {status = "Suspended", message = "spec.suspend is true"}
end
-- Also -1, which the API server sets before the first reconcile.
if status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "The operator has not reconciled this generation yet"}
end
local on = {}
local message = {}
for _, condition in ipairs(status.conditions or {}) do
  on[condition.type] = condition.status == "True"
  message[condition.type] = condition.message
end
if on.Ready then
  -- The token is valid even while its refresh fails. Instances have no UpToDate.
  return {status = "Healthy", message = on.UpToDate == false and message.UpToDate or message.Ready}
end
if on.Reconciling then
  return {status = "Progressing", message = message.Reconciling}
end
if on.Ready == nil then
  return {status = "Progressing", message = "The operator has not written a status yet"}
end
return {status = "Degraded", message = message.Stalled or message.Ready}

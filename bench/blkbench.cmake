# stellarium-blkbench: load for vhost-user-blk back-ends.
find_package(CLI11 REQUIRED)
find_package(nlohmann_json REQUIRED)
add_executable(stellarium-blkbench ${CMAKE_CURRENT_LIST_DIR}/blkbench.cc)
target_link_libraries(stellarium-blkbench PRIVATE
  stellarium_frontend_vhost_client CLI11::CLI11 nlohmann_json::nlohmann_json)
